"""One thread per process: the tests run in several, and threads that wait for each other's cores cost a hundredfold."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start inherit it
