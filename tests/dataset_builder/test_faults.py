"""A whole build against a server that fails in every way: each row ends accepted or in the ledger, no key anywhere."""

import pytest


KEY = "sk-test-0123456789abcdef"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def flags(server, folder):
    teacher = ("--teacher", "openai", "--base_url", server.base_url, "--timeout", 0.5, "--max_retries", 1)
    return ("--source", "local_folder", "--video_root", folder, *teacher)
