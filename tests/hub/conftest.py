"""The stand-in of the Hub, and this process made to use it."""

import pytest
import transformers.utils.hub
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import close_session
from stand_in import running


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", HfApi(endpoint=server.url))
        monkeypatch.setenv("HF_TOKEN", "writer")
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
        yield server
    close_session()
