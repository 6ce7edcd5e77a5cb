"""What the tests of sharded runs share."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # the processes import it too, whatever else is called `tests` there
