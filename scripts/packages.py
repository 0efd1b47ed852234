"""What the scripts share: the Python packages that they need, found where they are, else in a virtual environment (.venv) made
on first need; and how a script ends whose output nobody takes."""
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


def run(main):
    """main(), which prints a table. A reader who has read enough (| head) ends it without a word, a full disk with one line."""
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left goes nowhere
        sys.exit(141 if isinstance(e, BrokenPipeError) else f"{Path(sys.argv[0]).name}: {e}")
