"""From three fine-tunes to one mixed batch, in two minutes on a laptop: run it, or read it from top to bottom.

    python examples/tutorial.py

Everything is small and random here; with your own models, replace the paths by directories or hub ids.
"""

import tempfile
from pathlib import Path

import torch
import transformers

from dts_fast import DTSConfig, DTSLinear, DTSModel, compress, fit, load_adapter, route
from dts_fast.export import export_full

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp())

# 1. A base model, and full fine-tunes of it: every parameter has moved a little.


def new_model():
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config).eval()


base = new_model()
base.save_pretrained(folder / "base")
for name in ("sql", "math", "chat"):
    tuned = new_model()
    tuned.load_state_dict({n: p + 0.02 * torch.randn_like(p) for n, p in base.state_dict().items()})
    tuned.save_pretrained(folder / f"tuned-{name}")

# 2. Compress each. The budget counts all files of the adapter against the base's, and is obeyed to the byte. (Random
#    deltas have no structure to find: real ones keep most of a fine-tune's gain in 1 to 4 %.)

for name in ("sql", "math", "chat"):
    report = compress(folder / "base", folder / f"tuned-{name}", folder / name, DTSConfig(budget=0.10))
    print(f"{name}: {report.nbytes:,} bytes, {report.share:.1%} of the base")

# 3. What is in an adapter: for each parameter 2-bit codes, four levels a factor, and scales.

adapter = load_adapter(folder / "sql")
delta = adapter.parameters["model.layers.0.self_attn.q_proj.weight"]
print("rank", delta.rank, "codes", tuple(delta.u.codes.shape), delta.u.codes.dtype, "levels", delta.u.levels.tolist())

# 4. Serve all of them on one resident base. Every row of a batch names its adapter.

model = DTSModel.from_pretrained(folder / "base", folder / "sql", adapter_name="sql", max_adapters=3)
model.load_adapter(folder / "math", adapter_name="math")
prompts = torch.randint(3, 300, (3, 8))
tokens = model.generate(prompts, adapter_names=["sql", "math", "__base__"], max_new_tokens=5, do_sample=False)
print("a mixed batch:", tokens[:, 8:].tolist())

# 5. It is what three dense models would say: export one and compare.

export_full(folder / "sql", folder / "base", folder / "dense-sql")
dense = transformers.LlamaForCausalLM.from_pretrained(folder / "dense-sql").eval()
alone = dense.generate(prompts[:1], max_new_tokens=5, do_sample=False)
assert torch.equal(tokens[:1], alone)

# 6. Mixtures are exact and take no memory: their slots list their members' pages.

model.add_weighted_adapter(["sql", "math"], [0.5, 0.5], "both")
print("memory:", model.memory_report())

# 7. With more adapters than room, the least recently used make way and come back when they are asked for.

cache = DTSModel.from_pretrained(folder / "base", folder / "sql", "sql", max_adapters=2, eviction="lru")
for name in ("math", "chat"):
    cache.load_adapter(folder / name, name)
print("known:", cache.adapter_names, "in memory:", cache.resident_adapters)
cache(prompts, adapter_names="sql")
print("after a call with sql:", cache.resident_adapters)

# 8. One layer alone works the same.

linear = torch.nn.Linear(64, 128, bias=False)
layer = DTSLinear(linear, max_adapters=4)
layer.load_adapter("mine", fit(0.1 * torch.randn(128, 64), rank=16))
x = torch.randn(2, 64)
with torch.no_grad(), route(["mine", "__base__"]):
    y = layer(x)
assert torch.allclose(y[1], linear(x)[1].detach(), atol=1e-6)
print("done")
