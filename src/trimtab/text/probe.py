"""The neutral text that ships with Trimtab: what 'general text' is unless the user says."""

from importlib import resources

from trimtab.errors import InputError
from trimtab.types import Document


def probe_documents() -> list[Document]:
    """Read the shipped probe text, one document a file, in order of their names.

    Raises:
        InputError: The installation lacks the files.
    """
    folder = resources.files("trimtab") / "data" / "probe"
    files = sorted(folder.iterdir(), key=lambda file: file.name) if folder.is_dir() else []
    documents = [
        Document(f"probe/{file.name}", file.read_text(encoding="utf-8"))
        for file in files
        if file.name.endswith((".txt", ".py"))
    ]
    if not documents:
        raise InputError(
            "this installation of trimtab lacks its probe text (trimtab/data/probe)",
            hint="install trimtab again, or name general text of your own (--general)",
        )
    return documents
