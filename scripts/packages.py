"""The Python packages of the scripts: found where they are, else in a virtual environment (.venv) made on first need."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"


def need(*packages, required=True):
    """Returns whether the packages can be imported, after re-running this script with .venv's Python (made if need be)
    where they are not. If nothing helps: ends the script, or returns False for packages that are not required."""
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if not missing:
        return True
    inside = Path(sys.prefix).resolve() == VENV.resolve()
    if not inside and subprocess.run([ROOT / "scripts" / "setup.sh", "--python"], stdout=sys.stderr).returncode == 0:
        sys.stdout.flush()
        os.execv(VENV / "bin" / "python", [str(VENV / "bin" / "python")] + sys.argv)
    if required:
        sys.exit(f"{Path(sys.argv[0]).name}: needs the Python package(s) {', '.join(missing)} (scripts/requirements.txt)"
                 + (f"; {VENV} lacks them: delete that directory and try again" if inside else ""))
    return False
