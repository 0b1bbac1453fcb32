"""vLLM as its users run it, in a child process: `LLM` with its front end, its own speculation, its engine core alone.

The baselines of `bench verify` and `bench capacity`. No hook of ours is loaded here.
"""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

from pilotfish.bench.piped import serve
from pilotfish.protocol import cores

MODULE = "pilotfish.bench.stock_child"
#: as `cloud_worker/engines/vllm_start.py` has it: the same threads, the same attention kernels
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
}


class Child:
    """Opens `LLM` with the first question's settings, in `LLM`'s own words."""

    def __init__(self) -> None:
        self.llm: Any = None
        self.count = 0

    def handle(self, question: dict[str, Any]) -> Any:
        """open {cores_, threads, settings}, then any method below by name, with its arguments."""
        do = question.pop("do")
        if self.llm is None:
            return self._open(**question)
        return getattr(self, do)(**question)

    def _open(self, cores_: str, threads: int, settings: dict[str, Any]) -> str:
        cores.bind(cores_)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch
            from vllm import LLM

            torch.set_num_threads(threads)
            self.llm = LLM(**settings)
        return "open"

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> dict[str, Any]:
        """`lengths` greedy tokens after the prompts, through the front end."""
        from vllm import SamplingParams

        parameters = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
        start = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "texts": [list(o.outputs[0].token_ids) for o in outputs]}

    def core(self, prompts: list[list[int]], lengths: list[int]) -> dict[str, Any]:
        """The same on the engine core: token ids in and out, no tokenizer, no request front end."""
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        core = self.llm.llm_engine.engine_core.engine_core
        texts: dict[str, list[int]] = {}
        start = time.perf_counter()
        for prompt, length in zip(prompts, lengths, strict=True):
            self.count += 1
            texts[f"core {self.count}"] = []
            request = EngineCoreRequest(
                request_id=f"core {self.count}", prompt_token_ids=list(prompt), mm_features=None,
                sampling_params=SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False),
                pooling_params=None, arrival_time=time.time(), lora_request=None, cache_salt=None,
                data_parallel_rank=None,
            )  # fmt: skip
            core.add_request(*core.preprocess_add_request(request))
        while core.scheduler.has_unfinished_requests():
            outputs, executed = core.step()
            core.post_step(executed)
            for group in outputs.values():
                for output in group.outputs:
                    texts[output.request_id] += output.new_token_ids
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "texts": list(texts.values())}

    def score(self, ids: list[int], times: int) -> list[float]:
        """Seconds of each pass that says how likely the prompt's own tokens are, and draws one more."""
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            self.llm.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
        return seconds

    def logits(self, prefixes: list[list[int]]) -> list[list[float]]:
        """Raw logits of every id after each prefix: `open` with logprobs_mode="raw_logits" and max_logprobs=-1."""
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=1, logprobs=-1, detokenize=False)
        rows = []
        for prefix in prefixes:
            (output,) = self.llm.generate([{"prompt_token_ids": prefix}], parameters, use_tqdm=False)
            (row,) = output.outputs[0].logprobs
            rows.append([row[token].logprob for token in range(len(row))])
        return rows


if __name__ == "__main__":
    serve(Child().handle)
