"""Load for an SGLang server, from token ids, without a tokenizer: seeded, streaming, closed loop."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

VOCABULARY = range(1000, 40000)


@dataclass
class Sample:
    """One request as its client saw it; times in seconds."""

    ttft_s: float = 0.0
    latency_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""


def draw_tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(VOCABULARY.start, VOCABULARY.stop) for _ in range(count)]


def shared_prefix(groups: int, prompts: int, prefix: int, question: int, seed: int) -> list[list[int]]:
    """The shape of sglang.bench_serving's generated-shared-prefix: groups of prompts behind one prefix, shuffled."""
    draw = random.Random(seed)
    requests = []
    for _ in range(groups):
        head = draw_tokens(draw, prefix)
        requests += [head + draw_tokens(draw, question) for _ in range(prompts)]
    draw.shuffle(requests)
    return requests


async def request(session: aiohttp.ClientSession, url: str, prompt: list[int], output_tokens: int) -> Sample:
    """One streamed generation of exactly ``output_tokens`` tokens."""
    sample = Sample(prompt_tokens=len(prompt))
    body = {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": output_tokens, "temperature": 0, "ignore_eos": True},
        "stream": True,
    }
    begin = last = time.perf_counter()
    try:
        async with session.post(f"{url}/generate", json=body) as answer:
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                info: dict[str, Any] = json.loads(line[6:])
                if "meta_info" not in info:
                    sample.error = str(info.get("error", info))[:200]
                    break
                now = time.perf_counter()
                if not sample.ttft_s:
                    sample.ttft_s = now - begin
                else:
                    sample.gaps_s.append(now - last)
                last = now
                sample.output_tokens = info["meta_info"]["completion_tokens"]
                sample.cached_tokens = info["meta_info"]["cached_tokens"]
    except (aiohttp.ClientError, TimeoutError) as error:
        sample.error = repr(error)[:200]
    sample.latency_s = time.perf_counter() - begin
    if not sample.error and sample.output_tokens != output_tokens:
        sample.error = f"{sample.output_tokens} of {output_tokens} tokens came"
    return sample


async def closed_loop(
    url: str, prompts: list[list[int]], output_tokens: int, concurrency: int
) -> tuple[list[Sample], float]:
    """Keep ``concurrency`` requests under way until all are done; returns the samples and the seconds they took."""
    gate = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=1 << 20) as session:

        async def one(prompt: list[int]) -> Sample:
            async with gate:
                return await request(session, url, prompt, output_tokens)

        begin = time.perf_counter()
        samples = await asyncio.gather(*(one(prompt) for prompt in prompts))
        return list(samples), time.perf_counter() - begin


def summarize(samples: list[Sample], seconds: float) -> dict[str, float]:
    """Throughput and percentiles; every request must have succeeded.

    Raises:
        RuntimeError: one did not; the message is the first error.
    """
    errors = [sample.error for sample in samples if sample.error]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(samples)} requests failed, the first with: {errors[0]}")
    ttft_ms = [1000 * sample.ttft_s for sample in samples]
    gaps_ms = [1000 * gap for sample in samples for gap in sample.gaps_s]
    return {
        "throughput": len(samples) / seconds,
        "ttft_p50": float(np.percentile(ttft_ms, 50)),
        "ttft_p99": float(np.percentile(ttft_ms, 99)),
        "itl_p50": float(np.percentile(gaps_ms, 50)) if gaps_ms else 0.0,
        "itl_p99": float(np.percentile(gaps_ms, 99)) if gaps_ms else 0.0,
        "cached_share": sum(s.cached_tokens for s in samples) / sum(s.prompt_tokens for s in samples),
    }
