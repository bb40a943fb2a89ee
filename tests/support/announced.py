"""``announced.py DIRECTORY PREFIX STAGE``: a process that announces itself and waits to be killed.

A line on its input makes it withdraw first.
"""

import sys
from pathlib import Path

from bagel_triton.ipc.liveness import Announcement

announcement = Announcement(sys.argv[2], sys.argv[3], Path(sys.argv[1]))
print("announced", flush=True)
if sys.stdin.readline():
    announcement.withdraw()
    print("withdrawn", flush=True)
    sys.stdin.readline()
