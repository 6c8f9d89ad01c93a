"""Adapters on the Hugging Face hub: upload (downloads are `checkpoint.fetch_from_hub`)."""

from __future__ import annotations

from pathlib import Path

from .adapter_file import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, load_adapter, locate_adapter
from .errors import DTSError


def push_adapter(
    path: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    token: str | None = None,
) -> str:
    """Upload an adapter directory to a repository, which is created where it is not there.

    Args:
        path: adapter directory (or hub id, for a copy); it is checked first.
        repo_id: ``user/name``.
        private: whether a new repository is private; None for the account's default.
        revision: branch; the main one if None.
        commit_message: of the commit.
        token: access token; the one stored by ``hf auth login`` if None.

    Returns:
        The address of the commit.

    Raises:
        AdapterFormatError: not a sound adapter. Nothing is sent.
        DTSError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    fail = f"{repo_id}: the upload failed"
    folder = locate_adapter(path)
    load_adapter(folder)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            revision=revision,
            commit_message=commit_message,
            allow_patterns=[CONFIG_NAME, WEIGHTS_NAME, CARD_NAME],
        )
    except HFValidationError as error:
        raise DTSError(f"{fail}: not the name of a repository ({error}). Expected user/name.") from error
    except HfHubHTTPError as error:
        raise DTSError(f"{fail}: the hub refused ({error}). Log in with: hf auth login.") from error
    except LocalTokenNotFoundError as error:
        raise DTSError(f"{fail}: no access token is stored. Log in with: hf auth login.") from error
    except Exception as error:  # of whatever library the hub's client speaks HTTP with
        raise DTSError(
            f"{fail}: the hub cannot be reached ({type(error).__name__}: {error}). Check the network and HF_ENDPOINT, "
            "then push again."
        ) from error
    return str(commit.commit_url)
