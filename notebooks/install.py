# @title Install pdx for this runtime (TPU, GPU or CPU) { display-mode: "form" }
# @markdown Run this first, before anything imports jax. If this notebook lies alone, as in Colab, set SOURCE:
# @markdown - a git address, `git+https://HOST/OWNER/pdx.git`, with a tag or a commit behind an `@` if you like,
# @markdown - a wheel that you uploaded, `pdx_inference-0.1.0-py3-none-any.whl`, its URL, or the folder of a checkout,
# @markdown - `pdx-inference`, the package index, once pdx is published there;
# @markdown - empty: the `pdx_inference-*.whl` beside this notebook, or the checkout around it.
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from glob import glob
from importlib import metadata
from pathlib import Path

SOURCE = ""  # @param {type:"string"}
warnings.filterwarnings("ignore", "To exit: use")  # which IPython would add where this cell stops

# Which runtime? Devices say it, then the environment; an installed libtpu counts in Colab alone.
env, colab = os.environ, "COLAB_RELEASE_TAG" in os.environ or "COLAB_GPU" in os.environ
nvidia = glob("/dev/nvidia[0-9]*") or (
    shutil.which("nvidia-smi") and b"GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout
)
google = any(Path(path).read_text().strip() == "0x1ae0" for path in glob("/sys/bus/pci/devices/*/vendor"))
tpu_named = env.get("COLAB_TPU_1VM") or env.get("COLAB_TPU_ADDR") or env.get("TPU_ACCELERATOR_TYPE")
parts = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "numpy")
before = {name: next((d.version for d in metadata.distributions(name=name)), None) for name in parts}
if glob("/dev/accel[0-9]*") or (google and glob("/dev/vfio/[0-9]*")):
    runtime = "tpu"
elif nvidia:
    runtime = "gpu"
elif tpu_named or (colab and before["libtpu"]):
    runtime = "tpu"
else:
    runtime = "gpu" if env.get("COLAB_GPU", "0") not in ("", "0") else "cpu"

# The extra of the runtime, and of what is there already: otherwise it would stay behind at an older release.
cuda = "cuda13" if before["jax-cuda13-plugin"] else "cuda"
extras = {"tpu"} if runtime == "tpu" or before["libtpu"] else set()
extras |= {cuda} if runtime == "gpu" or before["jax-cuda12-plugin"] or before["jax-cuda13-plugin"] else set()

# From where? One requirement, with the extras, as pip and uv take it.
here, source = Path.cwd(), SOURCE.strip()
if not source:
    wheels = sorted(here.glob("pdx_inference-*.whl"), key=os.path.getmtime)
    checkouts = [p for p in (here, *here.parents) if (p / "pdx").is_dir() and (p / "pyproject.toml").is_file()]
    source = str((wheels[-1:] or checkouts or [""])[0])
if re.match(r"git@[\w.-]+:", source):
    source = "git+ssh://" + source.replace(":", "/", 1)
elif re.match(r"https?://", source) and not re.search(r"\.(whl|zip|tar\.gz)($|[?#])", source):
    source = "git+" + source
with_extras = f"pdx-inference[{','.join(sorted(extras))}]" if extras else "pdx-inference"
if re.match(r"[\w+]+://", source):
    requirement = f"{with_extras} @ {source}"
elif source and Path(source).expanduser().exists():
    requirement = f"{with_extras} @ {Path(source).expanduser().resolve().as_uri()}"
elif named := re.fullmatch(r"pdx[-_.]inference\s*([=<>!~].*)?", source):
    requirement = with_extras + (named[1] or "")
elif source:
    raise SystemExit(f"SOURCE = {source!r} is no file or folder here and no address: see the head of this cell.")
else:
    requirement = None

# Install, unless SOURCE is not set and what is installed has all it needs.
whole = next(metadata.distributions(name="pdx-inference"), None) is not None
whole = whole and (runtime != "tpu" or before["libtpu"])
whole = whole and (runtime != "gpu" or before["jax-cuda12-plugin"] or before["jax-cuda13-plugin"])
if whole and not SOURCE and importlib.util.find_spec("pdx"):
    versions = importlib.import_module("pdx.installation.versions")
    whole = all(misfit.restart for misfit in versions.misfits())
if SOURCE or not whole:
    if requirement is None:
        raise SystemExit("pdx is not here to install: set SOURCE in this cell, whose head says to what.")
    installer = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uv", "pip"]
    if installer[0] == "uv" and not shutil.which("uv"):
        raise SystemExit("There is neither pip nor uv here: `!python -m ensurepip` brings pip.")
    target = ["--python", sys.executable] if installer[0] == "uv" else ["--disable-pip-version-check"]
    print(f"{runtime.upper()} runtime: installing {requirement}", flush=True)
    done = subprocess.run([*installer, "install", "-q", *target, requirement], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{installer[-1]} could not install it:\n{(done.stdout + done.stderr).strip()[-2000:]}")
    importlib.invalidate_caches()

# What is loaded stays what it was until Python starts anew.
after = {name: next((d.version for d in metadata.distributions(name=name)), None) for name in parts}
stale = [n for n in ("jax", "jaxlib", "numpy") if n in sys.modules and sys.modules[n].__version__ != after[n]]
if stale or ("jax" in sys.modules and after != before):
    raise SystemExit("Restart the runtime (Colab: Runtime > Restart session), then run from the first cell on.")

from pdx.installation import versions  # noqa: E402

if misfits := versions.misfits():
    raise SystemExit(versions.message(misfits))

import jax  # noqa: E402

try:
    backend, why = jax.default_backend(), ""
except RuntimeError as error:
    backend, why = "no backend", f" ({str(error).splitlines()[0]})"
if runtime != "cpu" and backend != runtime:
    asked = f"JAX_PLATFORMS is {env['JAX_PLATFORMS']!r}: remove it. " if env.get("JAX_PLATFORMS") else ""
    raise SystemExit(
        f"This is a {runtime.upper()} runtime, but JAX runs on {backend}{why}. {asked}Close what else holds the "
        f"{runtime.upper()}, restart the runtime (Colab: Runtime > Restart session), run this cell first. If it stays "
        "so: Runtime > Disconnect and delete runtime. `!pdx doctor` says more."
    )
print(f"{backend}:", ", ".join(f"{name} {version}" for name, version in after.items() if version))
