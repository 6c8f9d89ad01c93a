"""What an installed package does without pytest and transformers: `make wheels` runs it in a bare environment.

python tests/smoke.py native|pure
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from dts_fast import DTSConfig, DTSLinear, DTSModel, compress, fit, native, route

expected = sys.argv[1]
if (native.MODULE is not None) != (expected == "native"):
    sys.exit(f"expected a {expected} package; the extension is {native.REASON or 'there'}")

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp())
base = nn.Sequential(nn.Linear(48, 64), nn.LayerNorm(64), nn.Linear(64, 20))
for name, change in (("base", 0.0), ("tuned", 0.1)):
    (folder / name).mkdir()
    tensors = {n: p.detach() + change * torch.randn_like(p) for n, p in base.named_parameters()}
    save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
compress(folder / "base", folder / "tuned", folder / "adapter", DTSConfig(density=0.5))
model = DTSModel(base, eviction="lru")
model.load_adapter(folder / "adapter", "a")
x = torch.randn(2, 48)
with torch.no_grad(), route(["a", "__base__"]):
    y = model(x)
    personal = model.merge_and_unload("a")(x)
torch.testing.assert_close(y[0], personal[0], rtol=1e-4, atol=1e-4)

layer = DTSLinear(nn.Linear(48, 64).bfloat16())
layer.load_adapter("a", fit(torch.randn(64, 48), rank=16))
with torch.no_grad(), route("a"):
    assert layer(x.bfloat16()).shape == (2, 64)

done = subprocess.run(
    [Path(sys.executable).with_name("dts-fast"), "doctor"], capture_output=True, text=True, check=True
)
backend = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith("CPU C++")]
print(f"python {sys.version.split()[0]}, torch {torch.__version__}: {backend[0]}")
