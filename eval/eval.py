"""What `python eval/NAME.py` finds under the name of the package, because Python then looks for modules in
the script's own folder: it says how the command is started."""
import sys
from pathlib import Path

sys.exit(f"error: start it as a module, in the folder above: python -m eval.{Path(sys.argv[0]).stem}")
