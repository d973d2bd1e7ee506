"""How commands say how many there are."""


def counted(number: int, noun: str) -> str:
    """As in "1 result" and "1,000 results"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
