"""A finished run to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from mezo.errors import UserError


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
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"push_to_hub {repo_id}: {reason}; the run is complete in {str(run)!r}") from None
    return str(address)
