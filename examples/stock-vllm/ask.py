"""Sends one prompt to several models of an OpenAI-compatible server at once, including task sets.

    python examples/stock-vllm/ask.py "Reverse: kitten" ckpt@math ckpt@math:0.5+nlu ckpt

`--url` is the server's address (default: http://127.0.0.1:8000/v1). README.md in this folder explains model names.
"""

from __future__ import annotations

import argparse
import asyncio

from openai import AsyncOpenAI, OpenAIError


async def answer(client: AsyncOpenAI, model: str, prompt: str, max_tokens: int) -> str:
    try:
        completion = await client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, temperature=0)
    except OpenAIError as error:
        return f"refused: {error}"
    return completion.choices[0].text


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none", help="the server's --api-key")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    async with AsyncOpenAI(base_url=args.url, api_key=args.api_key) as client:
        answers = await asyncio.gather(*(answer(client, model, args.prompt, args.max_tokens) for model in args.models))
    for model, text in zip(args.models, answers, strict=True):
        print(f"{model}: {text!r}")


if __name__ == "__main__":
    asyncio.run(main())
