"""The sheet of hardware, prices, model shapes and factors: a dated data file with sources."""

import math
from datetime import date
from functools import cache
from importlib import resources

from pydantic import BaseModel, ConfigDict, Field

from trimtab.costing.ranges import Range
from trimtab.errors import InputError

SHEET_NAME = "sheet.json"


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Source(_Entry):
    """Where a figure is from.

    Attributes:
        address: Web address, or a file of this repository.
        date: Day on which the source was read, or which it states for itself.
        note: What the figure does not say, or how sure it is.
    """

    address: str
    date: date
    note: str = ""


class Offer(_Entry):
    """A public price.

    Attributes:
        provider: Who asks it.
        usd_per_gpu_hour: US dollars for one accelerator for one hour, without tax.
        source: Where and when it was listed.
    """

    provider: str
    usd_per_gpu_hour: float = Field(gt=0)
    source: Source


class Gpu(_Entry):
    """An accelerator.

    Attributes:
        title: Its name for people.
        bf16_flops: Peak dense BF16 floating-point operations a second.
        memory_bytes: Its memory.
        bandwidth: Peak bytes a second between memory and chip.
        source: Of these figures.
        offers: Public prices.
    """

    title: str
    bf16_flops: float = Field(gt=0)
    memory_bytes: float = Field(gt=0)
    bandwidth: float = Field(gt=0)
    source: Source
    offers: tuple[Offer, ...] = Field(min_length=1)

    @property
    def usd_per_hour(self) -> Range:
        """Lowest and highest listed price of one for one hour, US dollars."""
        prices = [offer.usd_per_gpu_hour for offer in self.offers]
        return Range(min(prices), max(prices))


class Shape(_Entry):
    """Sizes of a decoder-only transformer with gated feed-forward layers.

    Attributes:
        name: A published model that has them.
        params: All its parameters.
        layers: Number of layers.
        hidden: Width of the hidden state.
        attention: Heads times their width.
        key_value: Heads of keys times their width, the same for values.
        feed_forward: Inner width of a feed-forward layer.
        vocab: Rows of the unembedding.
        tied: Whether the input embedding is the unembedding.
        address: Of its published configuration.
    """

    name: str
    params: float
    layers: int
    hidden: int
    attention: int
    key_value: int
    feed_forward: int
    vocab: int
    tied: bool
    address: str

    @property
    def matmul_params(self) -> float:
        """Parameters that a token is multiplied with: an untied input embedding is looked up."""
        lookup = 0 if self.tied else self.vocab * self.hidden
        return max(self.params - lookup, self.params / 2)


class Factor(_Entry):
    """A number of the model that is neither a size nor a price.

    Attributes:
        low: Its least value.
        high: Its greatest value.
        meaning: What it is, with its unit.
        sources: Where it is from; a factor without one is an assumption.
    """

    low: float
    high: float
    meaning: str
    sources: tuple[Source, ...] = ()

    @property
    def range(self) -> Range:
        """Its bounds."""
        return Range(self.low, self.high)


class Sheet(_Entry):
    """Everything that the cost model knows about the world.

    Attributes:
        date: Day of the sheet.
        gpus: Accelerators by the name of --gpu.
        shapes: Published models, smallest first.
        factors: By name.
    """

    date: date
    gpus: dict[str, Gpu]
    shapes: tuple[Shape, ...]
    factors: dict[str, Factor]

    def gpu(self, name: str) -> Gpu:
        """Find an accelerator by its name.

        Raises:
            InputError: The sheet does not have it.
        """
        found = self.gpus.get(name.strip().lower().replace("-", "").replace(" ", ""))
        if found is None:
            raise InputError(
                f"unknown GPU {name!r}; the sheet has {', '.join(self.gpus)}",
                hint="name one of these in --gpu, and give its hourly price in --price if you pay"
                " another",
            )
        return found

    def shape(self, params: float) -> Shape:
        """Sizes for a number of parameters: those of the nearest published model, by ratio."""
        nearest = min(self.shapes, key=lambda shape: abs(math.log(params / shape.params)))
        return nearest.model_copy(update={"params": params})

    def factor(self, name: str) -> Range:
        """Bounds of a factor."""
        return self.factors[name].range


@cache
def read_sheet() -> Sheet:
    """Read the sheet that ships with Trimtab."""
    text = (resources.files("trimtab.costing") / SHEET_NAME).read_text(encoding="utf-8")
    return Sheet.model_validate_json(text)
