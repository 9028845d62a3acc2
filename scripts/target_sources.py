"""Give Rust sources the times at which cargo's target folder first saw what they hold.

Cargo rebuilds what is older than its sources, by their times alone, and many clones build in one target folder. A clone's files
are as old as the clone: what another clone has built since, of other sources, would pass for its own. And a fresh clone of the
very same sources would build everything again. So the folder lists each source with a hash and the time at which it first had
these contents, and sources are given these times before every build.

    target_sources.py check TARGET     set the times; exit status 3 if the folder knows other sources
    target_sources.py claim TARGET     enter these sources in the list, those that changed with the present time

Those who call it hold a lock of the folder: shared for `check` and for the build that follows, exclusive for `claim`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OTHERS = 3


def sources() -> dict[str, str]:
    """Hashes of what cargo reads, by path."""
    files = [ROOT / "Cargo.toml", ROOT / "Cargo.lock", *(path for path in (ROOT / "rust").rglob("*") if path.is_file())]
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def known(record: Path) -> dict[str, tuple[str, int]]:
    """Hash and time (ns) by path; nothing where the list is missing or no list."""
    try:
        return {path: (str(held), int(since)) for path, (held, since) in json.loads(record.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def main(command: str, target: str) -> int:
    record = Path(target) / "sources.json"
    old, new = known(record), sources()
    if command == "claim":
        now = time.time_ns()
        kept = {path: old[path] if path in old and old[path][0] == held else (held, now) for path, held in new.items()}
        record.parent.mkdir(parents=True, exist_ok=True)
        fresh = record.with_suffix(".new")
        fresh.write_text(json.dumps(kept))
        fresh.replace(record)
        return 0
    if {path: held for path, (held, _) in old.items()} != new:
        return OTHERS
    for path, (_, since) in old.items():
        if (ROOT / path).stat().st_mtime_ns != since:
            os.utime(ROOT / path, ns=(since, since))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
