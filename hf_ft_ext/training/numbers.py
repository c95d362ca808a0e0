"""Numbers as people read them."""


def share_text(part: float | None, whole: float | None) -> str:
    """`part` of `whole` in percent, at most three digits and no exponent; empty if one of them is unknown or zero.

    Only all is `100 %`, and only nothing would be `0 %`.
    """
    if not part or not whole:
        return ""
    share = 100 * part / whole
    if share < 0.01:
        return "less than 0.01 %"
    if 99.95 <= share < 100:
        return "more than 99.9 %"
    digits = 1 if share >= 10 else 2 if share >= 1 else 3
    return f"{share:.{digits}f}".rstrip("0").rstrip(".") + " %"
