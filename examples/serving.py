"""Requests of many users, each with an adapter of its own, in common batches: what stands between an HTTP framework and
`DTSModel`. Run it to see a small random model serve a crowd.

    python examples/serving.py

In FastAPI, say:

    @app.post("/{user}")
    async def complete(user: str, prompt: list[int]):
        try:
            return await batcher.complete(user, prompt)
        except UnknownAdapterError as error:  # no such user
            raise HTTPException(404, str(error))
        except CapacityError as error:  # more users in one batch than max_adapters
            raise HTTPException(503, str(error))
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import torch
import transformers

from dts_fast import DTSConfig, DTSModel, compress
from dts_fast.errors import UnknownAdapterError


class Batcher:
    """Collects requests while a batch runs, and runs them together.

    Args:
        model: with ``max_adapters`` of ``most`` or more, so that any batch has room; with ``eviction="lru"`` for more
            users than that.
        most: requests of a batch.
        settings: of ``generate``.
    """

    def __init__(self, model: DTSModel, most: int = 8, **settings: object) -> None:
        self.model, self.most, self.settings = model, most, settings
        self.waiting: asyncio.Queue[tuple[str, list[int], asyncio.Future]] = asyncio.Queue()

    async def complete(self, user: str, prompt: list[int]) -> list[int]:
        """The tokens that a user's model puts behind a prompt.

        Raises:
            UnknownAdapterError: no such user; told at once, so that it does not fail the others of a batch.
        """
        self.model.slots.check(user)
        answer = asyncio.get_running_loop().create_future()
        await self.waiting.put((user, prompt, answer))
        return await answer

    async def run(self) -> None:
        """Serves until it is cancelled."""
        while True:
            batch = [await self.waiting.get()]
            while len(batch) < self.most and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            users, prompts, answers = zip(*batch, strict=True)
            try:
                # In a thread: the event loop goes on taking requests meanwhile.
                results = await asyncio.to_thread(self.generate, users, prompts)
            except Exception as error:
                results = [error] * len(batch)
            except BaseException:  # cancelled
                for answer in answers:
                    answer.cancel()
                raise
            for answer, result in zip(answers, results, strict=True):
                if not answer.done():  # its user may have gone
                    (answer.set_exception if isinstance(result, Exception) else answer.set_result)(result)

    def generate(self, users: tuple[str, ...], prompts: tuple[list[int], ...]) -> list[list[int]]:
        longest, pad = max(map(len, prompts)), self.settings.get("pad_token_id", 0)
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        tokens = self.model.generate(ids, attention_mask=mask, adapter_names=list(users), **self.settings)
        return [_without(pad, row) for row in tokens[:, longest:].tolist()]


def _without(pad: int, row: list[int]) -> list[int]:
    """Rows that end are padded until the last of their batch has ended."""
    while row and row[-1] == pad:
        row.pop()
    return row


def make_adapters(folder: Path, users: list[str]) -> None:
    """A small random model, and a fine-tune of it for each user, compressed."""
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    for user in users:
        tuned = transformers.LlamaForCausalLM(config)
        tuned.load_state_dict({n: p + 0.05 * torch.randn_like(p) for n, p in base.state_dict().items()})
        tuned.save_pretrained(folder / f"tuned-{user}")
        compress(folder / "base", folder / f"tuned-{user}", folder / user, DTSConfig(budget=0.10))


async def main() -> None:
    torch.manual_seed(0)
    folder, users = Path(tempfile.mkdtemp()), [f"user{i}" for i in range(6)]
    make_adapters(folder, users)
    model = DTSModel.from_pretrained(folder / "base", folder / users[0], users[0], max_adapters=4, eviction="lru")
    for user in users[1:]:
        model.load_adapter(folder / user, user)
    batcher = Batcher(model, most=4, max_new_tokens=5, do_sample=False, pad_token_id=0)
    server = asyncio.create_task(batcher.run())
    prompts = {f"user{i % 6}": torch.randint(3, 300, (4 + i,)).tolist() for i in range(12)}
    answers = await asyncio.gather(*(batcher.complete(user, prompt) for user, prompt in prompts.items()))
    for (user, prompt), answer in zip(prompts.items(), answers, strict=True):
        alone = batcher.generate((user,), (prompt,))[0]
        print(user, answer, "as alone" if answer == alone else "NOT as alone")
    try:
        await batcher.complete("nobody", [3, 4])
    except UnknownAdapterError as error:
        print(error)
    server.cancel()


if __name__ == "__main__":
    asyncio.run(main())
