"""Engines on top of the cache: a reference engine that any model can run in, and what runs HF models in it.

    request, sampling   what is asked, what comes back, how a token is chosen
    row                 the seam to models: what one forward pass is told (`Runner`)
    sequence            one request being served: its lease, its own slots, how far it is
    scheduler           who is admitted, who gives way
    engine              the loop: prefetch, admit, compute a chunk, decode, hand over
    hf                  models of transformers 5 as runners; needs the extra `hf`

Everything here uses the public API of the cache only.
"""
