"""What a merged or fused model converses with: a tokenizer, and the tokens that its answers end at."""

import shutil
from pathlib import Path

from h3scale.checkpoint.shards import GENERATION, copy_tokenizer


def copy_conversation(tokenizer: Path | None, base: Path, target: Path) -> None:
    """Copies the tokenizer's files and generation_config.json of the same folder; the base's where that has none (an adapter)."""
    if tokenizer is not None:
        copy_tokenizer(tokenizer, target)
    folders = [folder for folder in (tokenizer, base) if folder is not None and (folder / GENERATION).is_file()]
    if folders:
        shutil.copyfile(folders[0] / GENERATION, target / GENERATION)
