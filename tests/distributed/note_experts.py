"""One rank of a training run that notes which backends computed its experts, in RANK.json of the folder NOTES.

NOTES=FOLDER python -m tests.distributed.note_experts RECIPE key=value ...
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from h3scale import log
from h3scale.model.expert_compute import registry
from h3scale.train.__main__ import main

called: set[str] = set()


def noted(name: str, make: Any) -> Any:
    def compute(*arguments: Any) -> Any:
        called.add(name)
        return make()(*arguments)

    return lambda: compute


if __name__ == "__main__":
    registry._BACKENDS |= {name: noted(name, make) for name, make in registry._BACKENDS.items()}
    code = main(sys.argv[1:])
    (Path(os.environ["NOTES"]) / f"{log.RANK}.json").write_text(json.dumps(sorted(called)))
    sys.stdout.flush()
    os._exit(code)
