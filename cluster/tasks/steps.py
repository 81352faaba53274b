"""Written-out column arithmetic: the reasoning text that dsv4-nano learns to produce.

Every line of a calculation needs only digits already on the page, which is what lets a small model be exact.
"""

from __future__ import annotations

PLACES = ("Ones", "Tens", "Hundreds", "Thousands", "Ten thousands", "Hundred thousands")


def add(a: int, b: int) -> str:
    """Steps of `a + b`, ending in the sum."""
    left, right = str(a)[::-1], str(b)[::-1]
    parts, carry = [], 0
    for place in range(max(len(left), len(right))):
        terms = [digits[place] for digits in (left, right) if place < len(digits)]
        if carry:
            terms.append("1")
        total = sum(int(term) for term in terms)
        line = f"{' + '.join(terms)} = {total}" if len(terms) > 1 else str(total)
        parts.append(f"{PLACES[place]}: {line}.")
        carry = total // 10
    return f"{a} + {b}. {' '.join(parts)} So {a} + {b} = {a + b}."


def subtract(a: int, b: int) -> str:
    """Steps of `a - b` for numbers of either order, ending in the difference."""
    if b > a:
        return f"{a} - {b} is below zero. {subtract(b, a)} So {a} - {b} = -{b - a}."
    left, right = str(a)[::-1], str(b)[::-1]
    parts, borrow = [], 0
    for place, digit in enumerate(left):
        taken = [d for d in (right[place : place + 1], "1" if borrow else "") if d]
        rest = int(digit) - sum(int(d) for d in taken)
        line = " - ".join([digit, *taken])
        if rest < 0:
            rest += 10
            line = f"{line} borrows, {' - '.join([f'1{digit}', *taken])} = {rest}"
            borrow = 1
        else:
            borrow = 0
            line = f"{line} = {rest}" if taken else str(rest)
        parts.append(f"{PLACES[place]}: {line}.")
    return f"{a} - {b}. {' '.join(parts)} So {a} - {b} = {a - b}."


def multiply(a: int, b: int) -> str:
    """Steps of `a * b` with `b` of one or two digits, ending in the product."""
    if b >= 10:
        tens, ones = divmod(b, 10)
        if not ones:
            return f"{a} * {b} is {a} * {tens} and a zero. {multiply(a, tens)} So {a} * {b} = {a * b}."
        lines = [f"{a} * {b} is {a} * {tens * 10} and {a} * {ones}.", multiply(a, tens)]
        lines += [f"So {a} * {tens * 10} = {a * tens * 10}.", multiply(a, ones), add(a * tens * 10, a * ones)]
        return f"{' '.join(lines)} So {a} * {b} = {a * b}."
    parts, carry = [], 0
    for place, digit in enumerate(str(a)[::-1]):
        product = int(digit) * b
        line = f"{digit} * {b} = {product}"
        if carry:
            line = f"{line}, {product} + {carry} = {product + carry}"
        parts.append(f"{PLACES[place]}: {line}.")
        carry = (product + carry) // 10
    return f"{a} * {b}. {' '.join(parts)} So {a} * {b} = {a * b}."


def divide(a: int, b: int) -> str:
    """Steps of the long division `a / b` that leaves no rest, for `b` of one digit."""
    parts, rest = [], 0
    for digit in str(a):
        current = rest * 10 + int(digit)
        rest = current % b
        parts.append(f"{current} / {b} = {current // b} rest {rest}.")
    return f"{a} / {b}. {' '.join(parts)} So {a} / {b} = {a // b}."
