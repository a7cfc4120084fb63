"""vLLM's side of `multiturn.py`; runs in an environment that has vLLM, in one process, without compiling.

    venvs/vllm/bin/python benchmarks/multiturn_vllm.py SETTING

SETTING is JSON. The last line of the output is JSON: what was served, and in how many seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tiertree.chat import Workload, converse
from tiertree.engines.request import Cached, Finish, Reply, Request


class VllmEngine:
    """vLLM behind the interface that clients know."""

    def __init__(self, engine: Any, sampling: Any) -> None:
        self.idle = False
        self._engine = engine
        self._sampling = sampling
        self._replies: dict[str, Reply] = {}
        self._count = 0

    def submit(self, request: Request) -> Reply:
        """Take a request on."""
        reply = Reply(request, self._count, arrived=time.monotonic())
        self._count += 1
        self._replies[str(reply.number)] = reply
        prompt = {"prompt_token_ids": list(request.tokens)}
        parameters = self._sampling(temperature=0, max_tokens=request.max_new_tokens, ignore_eos=True)
        self._engine.add_request(str(reply.number), prompt, parameters)
        return reply

    def step(self) -> list[Reply]:
        """One step of vLLM's scheduler."""
        touched = []
        for each in self._engine.step():
            reply, now = self._replies[each.request_id], time.monotonic()
            reply.tokens = list(each.outputs[0].token_ids)
            if reply.first_token is None and reply.tokens:
                reply.first_token = now
                reply.cached = Cached(device=each.num_cached_tokens or 0)
            if each.finished:
                reply.finish, reply.finished = Finish.LENGTH, now
            touched.append(reply)
        return touched

    def wait(self, seconds: float) -> None:
        """Nothing ever comes by itself."""


def main(text: str) -> None:
    """Have the conversations of the setting `text`."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    setting = json.loads(text)
    workload = Workload(**setting["workload"])
    arguments = EngineArgs(
        model=setting["model"],
        skip_tokenizer_init=True,
        dtype="float32",
        block_size=setting["block"],
        num_gpu_blocks_override=setting["blocks"],
        max_model_len=workload.longest,
        max_num_seqs=workload.users,
        enable_prefix_caching=True,
        enforce_eager=True,
        disable_log_stats=True,
        seed=0,
    )
    served = VllmEngine(LLMEngine.from_engine_args(arguments), SamplingParams)
    warm = replace(workload, users=1, turns=1, seed=workload.seed + 1)
    converse(warm, served)
    course = converse(workload, served, parallel=setting["parallel"])
    print(json.dumps({"served": [each.plain() for each in course.served], "seconds": course.seconds}))


if __name__ == "__main__":
    main(sys.argv[1])
