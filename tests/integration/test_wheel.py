"""What a stranger installs: the wheel alone, from another folder, finds its recipes and engine specs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import trsp_deploy

CHECKOUT = Path(trsp_deploy.__file__).parent.parent


def test_wheel_carries_recipes_and_engine_specs(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=CHECKOUT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    for kind in ("recipes", "engines"):
        script = f"from trsp_deploy.cli import main; import sys; sys.argv[1:] = ['{kind}', 'ls', '--json']; main()"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        )
        shipped = sorted(path.stem for path in (CHECKOUT / kind).glob("*.yaml"))
        assert [row[kind.removesuffix("s")] for row in json.loads(done.stdout)] == shipped
