"""An OpenAI-compatible HTTP server on top of an engine; `tiertree serve` starts it.

    client ─HTTP─▶ app ─▶ asked ─▶ tokens ─▶ worker ═▶ engine, cache      one thread owns these
                   │     fields    text to   │ queue
    client ◀─SSE── answers ◀─ text ◀─────────┘ updates, once per step
                   JSON       pieces, stop strings

    routes      one request from body to answer       load   model, tokenizer and cache from options
    failures    errors as the API words them          run    sockets, signals, drain
    streams     answers in pieces; who hangs up is noticed

Needs the extra `serve`. Everything but `worker`'s thread runs in one event loop.
"""
