"""The Hugging Face Hub: a finished run to it, converted weights from it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from mezo.errors import UserError
from mezo.fingerprint import WEIGHT_NAMES

_BOT, _BOTS_TITLE = "SFconvertbot", "Adding `safetensors` variant of this model"


def converted_revision(repo_id: str) -> str | None:
    """The pull request `refs/pr/N` in which the Hub's own bot offers a model's pickled weights as safetensors.

    None if its main revision has some, or there is no such request, no such model or no connection. Nothing is loaded.
    """
    api = HfApi()
    try:
        if any(api.file_exists(repo_id, name) for name in WEIGHT_NAMES):
            return None
        discussions = api.get_repo_discussions(
            repo_id, author=_BOT, discussion_type="pull_request", discussion_status="open"
        )
        # The author is asked for and looked at: anybody can open a request of that title.
        found = [d.git_reference for d in discussions if d.author == _BOT and d.title == _BOTS_TITLE]
    except Exception:  # as below
        return None
    return found[0] if found else None


def push_run(run: Path, repo_id: str, *, private: bool | None = None) -> str:
    """Uploads a run's final weights, model card, state and journal, without its checkpoints.

    Args:
        run: the run's folder.
        repo_id: `name` or `owner/name`; made if it is not there.
        private: whether a new repository is private; the account's default if not given.

    Returns:
        The repository's address.

    Raises:
        UserError: not logged in, no right to write, or no connection; the run itself is complete.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=run,
            ignore_patterns=["checkpoint-*", ".*", "*.partial"],
            commit_message="Trained with mezo",
        )
    except Exception as error:  # the Hub's client has had three HTTP libraries, each with errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"push_to_hub {repo_id}: {reason}; the run is complete in {str(run)!r}") from None
    return str(address)
