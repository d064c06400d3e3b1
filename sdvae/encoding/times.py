"""Where the time of a run went: seconds that each step was at work, and which step held up the others."""

from dataclasses import dataclass, field, fields


@dataclass
class Times:
    """Seconds at work, added up over all processes; steps overlap, so they sum to more than `all`.

    Several processes read and decode; copying, encoding and writing are done by one each.
    """

    num_images: int = 0
    num_workers: int = 0
    read: float = 0.0
    decode: float = 0.0
    copy: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    waiting: float = 0.0  # of the encoder, for images
    all: float = 0.0
    psnr_db: dict[str, float] = field(default_factory=dict)  # of photos that were decoded back, by key

    def steps(self) -> dict[str, float]:
        """Seconds by step."""
        return {step: getattr(self, step) for step in ("read", "decode", "copy", "encode", "write", "waiting")}

    def shares(self) -> dict[str, float]:
        """Of each step, the share of the time that it was at work."""
        hands = {"read": max(1, self.num_workers), "decode": max(1, self.num_workers)}
        return {
            step: seconds / (self.all * hands.get(step, 1)) if self.all else 0.0
            for step, seconds in self.steps().items()
        }

    def slowest(self) -> str:
        """The step that held up the others: the one that was at work for the largest share of the time.

        "start" where most of the time nothing was at work: processes began, and imported what they need.
        """
        shares = self.shares()
        of_input = max("read", "decode", key=shares.__getitem__)
        # The same processes read and decode.
        shares |= {of_input: shares["read"] + shares["decode"], "waiting": 0.0}
        busiest = max(shares, key=shares.__getitem__)
        return busiest if shares[busiest] >= 0.5 else "start"

    def __iadd__(self, other: "Times") -> "Times":
        for name in (one.name for one in fields(self) if one.name not in ("psnr_db", "num_workers")):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.num_workers = max(self.num_workers, other.num_workers)
        self.psnr_db |= other.psnr_db
        return self
