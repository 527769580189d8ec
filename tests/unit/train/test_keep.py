"""What a run that was killed has left is not deleted by the next one."""

from pathlib import Path

import pytest

from h3scale.errors import OutputError
from h3scale.train.keep import check_left


@pytest.mark.parametrize("mark", ["manifest.json", "config.json"])
def test_models_of_a_run_that_did_not_end_are_deleted_by_force_alone(tmp_path: Path, mark: str) -> None:
    (tmp_path / "step-000010").mkdir()
    check_left(tmp_path, force=False)  # torn: nothing that could be used
    (tmp_path / "step-000010" / mark).write_text("{}")
    with pytest.raises(OutputError, match="step-000010: left by a run that did not end"):
        check_left(tmp_path, force=False)
    check_left(tmp_path, force=True)
    check_left(tmp_path / "none", force=False)
