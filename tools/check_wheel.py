"""Check for CI that a built wheel, installed alone, contains its recipes, DeepSpeed and SLURM files.

The heavy dependencies come from the current environment; the package itself comes from the wheel.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile


def main() -> None:
    """Install the wheel named on the command line into a temporary folder, and dry-run recipes with it."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{folder}/site"]
        subprocess.run([*pip, sys.argv[1]], check=True)
        environment = {**os.environ, "PYTHONPATH": f"{folder}/site"}

        def run(*arguments: str) -> str:
            done = subprocess.run(
                [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(f"error: {' '.join(arguments)}\n{done.stdout}{done.stderr}")
            return done.stdout

        place = run("-c", "import everest_ds; print(everest_ds.__file__)").strip()
        if not place.startswith(f"{folder}/site"):
            sys.exit(f"error: imported {place} instead of the wheel's package")
        open(os.path.join(os.path.dirname(place), "py.typed")).close()
        run("-m", "everest_ds", "recipes")
        run("-m", "everest_ds", "pretrain", "k400_pretrain_vit_base", "data.train=null", "--dry-run")
        run("-m", "everest_ds", "submit", "profile", "k400_pretrain_vit_base", "--dry-run")
        run("-c", "import everest_ds.training.loop")
        slurm = run("-c", "from everest_ds.shipped import shipped; print(shipped('slurm'))").strip()
        for file in ("pretrain.sbatch", "sweep.sbatch", "common.sh", "clusters/generic.env"):
            open(f"{slurm}/{file}").close()
        for stage in range(4):
            run(
                "-c",
                f"from everest_ds.shipped import shipped; open(shipped('ds_configs') / 'zero{stage}.json')",
            )
    print("ok: the wheel works on its own")


if __name__ == "__main__":
    main()
