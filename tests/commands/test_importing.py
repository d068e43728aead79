"""What commands import stays, and is left out of the search for garbage; everything else is found as before."""

import subprocess
import sys

SCRIPT = """
import gc, sys
from lorafit.commands.importing import import_for_good
before = gc.get_threshold()
import_for_good("torch")
assert gc.isenabled() and gc.get_threshold() == before
frozen = gc.get_freeze_count()
assert frozen > len(gc.get_objects())

class Node:
    alive = 0
    def __init__(self):
        self.itself = self
        Node.alive += 1
    def __del__(self):
        Node.alive -= 1

Node()
gc.collect()
assert Node.alive == 0

Node()
import_for_good("fractions")
assert "fractions" not in sys.modules and gc.get_freeze_count() <= frozen
gc.collect()
assert Node.alive == 0, "a process that is not ours would never get this back"
"""


def test_what_is_imported_is_left_out_of_the_search_for_garbage() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
