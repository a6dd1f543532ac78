"""What tests of training share."""

import pytest


@pytest.fixture(scope="session")
def tiny_checkpoint(pair, tmp_path_factory):
    """Folder of the tiny model with lively weights."""
    folder = tmp_path_factory.mktemp("base") / "storms-tiny"
    _, model, processor = pair
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
