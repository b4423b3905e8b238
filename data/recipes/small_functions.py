"""Small documented functions with worked examples, all from templates (this project's own, Apache-2.0). Used by derive_text.py.

make_function(p) gives one as (import line or "", source). Examples are what the function returned when it was run here.
"""
import re
from typing import Dict, List, Optional  # the names that hints use

NUMBERS = ["numbers", "values", "nums", "items", "lst", "arr", "scores", "prices", "ages", "heights", "levels", "data", "elements", "weights",
           "temperatures", "amounts", "counts", "digits", "points", "readings"]
TEXTS = ["text", "s", "string", "word", "sentence", "line", "message", "phrase", "title", "name"]
WORDS = ["words", "strings", "names", "lines", "labels", "titles", "tokens", "keys", "tags", "fruits"]
SINGLE = {"numbers": "number", "values": "value", "nums": "num", "items": "item", "lst": "x", "arr": "x", "scores": "score", "prices": "price",
          "ages": "age", "heights": "height", "levels": "level", "data": "value", "elements": "element", "weights": "weight",
          "temperatures": "temperature", "amounts": "amount", "counts": "count", "digits": "digit", "points": "point", "readings": "reading",
          "words": "word", "strings": "string", "names": "name", "lines": "line", "labels": "label", "titles": "title", "tokens": "token",
          "keys": "key", "tags": "tag", "fruits": "fruit"}
VOCABULARY = ("apple bridge candle dragon engine forest garden harbor island jungle kettle ladder mirror needle orange pencil quarter river "
              "silver table umbrella valley window yellow zebra cat dog sun moon tree bird stone cloud level radar noon civic a is the of in "
              "blue green small quick old bright paper").split()

# condition on {x}: name, words, needs a limit
CONDITIONS = [("even", "even", "{x} % 2 == 0"), ("odd", "odd", "{x} % 2 == 1"), ("positive", "positive", "{x} > 0"),
              ("negative", "negative", "{x} < 0"), ("nonzero", "not zero", "{x} != 0"), ("large", "greater than the limit", "{x} > limit"),
              ("small", "less than the limit", "{x} < limit"), ("at_least", "at least the limit", "{x} >= limit"),
              ("at_most", "at most the limit", "{x} <= limit"), ("divisible", "divisible by k", "{x} % k == 0"),
              ("multiple_of_three", "multiples of three", "{x} % 3 == 0"), ("two_digit", "between 10 and 99", "10 <= {x} <= 99")]
# change of {x}
CHANGES = [("squared", "the square of", "{x} * {x}"), ("doubled", "twice", "2 * {x}"), ("cubed", "the cube of", "{x} ** 3"),
           ("absolute", "the absolute value of", "abs({x})"), ("incremented", "one more than", "{x} + 1"), ("negated", "the negative of", "-{x}"),
           ("halved", "half of", "{x} // 2"), ("scaled", "k times", "k * {x}"), ("shifted", "k more than", "{x} + k")]
# character tests
LETTERS = [("vowels", "vowels", "{c}.lower() in 'aeiou'"), ("consonants", "consonants", "{c}.isalpha() and {c}.lower() not in 'aeiou'"),
           ("digits", "digits", "{c}.isdigit()"), ("uppercase", "uppercase letters", "{c}.isupper()"),
           ("lowercase", "lowercase letters", "{c}.islower()"), ("spaces", "spaces", "{c} == ' '"), ("letters", "letters", "{c}.isalpha()")]


def extra(test):
    """Parameters that a condition or a change brings along."""
    return [name for name in ("limit", "k") if re.search(rf"\b{name}\b", test)]


def numbers_example(p, low=-20, high=40):
    return [p.number(low, high) for _ in range(p.number(3, 7))]


def text_example(p):
    return " ".join(p(VOCABULARY) for _ in range(p.number(1, 5)))


def words_example(p):
    return [p(VOCABULARY) for _ in range(p.number(2, 6))]


class Draft:
    """What a maker gives: name, parameters as (name, type), result type, sentences, body lines, and examples' arguments."""

    def __init__(self, name, parameters, result, sentences, body, examples):
        self.name, self.parameters, self.result, self.sentences, self.body, self.examples = name, parameters, result, sentences, body, examples


def with_extra(p, names, arguments):
    return arguments + [p.number(2, 9) for _ in names]


def list_to_list(p):
    xs, (cname, cwords, test), (mname, mwords, change) = p(NUMBERS), p(CONDITIONS), p(CHANGES)
    x, kind = SINGLE[xs], p(["filter", "filter", "map", "both"])
    test, change = test.format(x=x), change.format(x=x)
    if kind == "filter":
        value, name = x, p([f"{cname}_{xs}", f"filter_{cname}", f"keep_{cname}_{xs}", f"get_{cname}_{xs}", f"only_{cname}"])
        sentences = [f"Return a list of the {xs} that are {cwords}.", f"Filter the given list of {xs} and keep only those that are {cwords}.",
                     f"Given a list of {xs}, return the ones which are {cwords}, in their original order."]
    elif kind == "map":
        test, value, name = "", change, p([f"{mname}_{xs}", f"{mname}_list", f"all_{mname}", f"make_{mname}"])
        sentences = [f"Return a list with {mwords} each of the {xs}.", f"For each element of {xs}, compute {mwords} it and return the list of results.",
                     f"Given a list of {xs}, return a new list that holds {mwords} every {x}."]
    else:
        value, name = change, p([f"{mname}_{cname}_{xs}", f"{cname}_{mname}"])
        sentences = [f"Return {mwords} each of the {xs} that is {cwords}.", f"Take the {xs} which are {cwords} and return a list with {mwords} each of them."]
    where = f" if {test}" if test else ""
    t = p(["result", "result", "out", "new_list", "found"])
    loop = [f"{t} = []", f"for {x} in {xs}:"] + ([f"    if {test}:", f"        {t}.append({value})"] if test else [f"    {t}.append({value})"]) + [f"return {t}"]
    body = p([loop, loop, [f"return [{value} for {x} in {xs}{where}]"]])
    names = list(dict.fromkeys(extra(test) + extra(value)))
    return Draft(name, [(xs, "List[int]")] + [(n, "int") for n in names], "List[int]", sentences, body,
                 lambda: with_extra(p, names, [numbers_example(p)]))


def list_to_number(p):
    xs, (cname, cwords, test) = p(NUMBERS), p(CONDITIONS)
    x = SINGLE[xs]
    test, verb = test.format(x=x), p(["sum", "sum", "count", "product", "largest", "smallest"])
    names = extra(test)
    t = {"sum": "total", "count": "count", "product": "product", "largest": "best", "smallest": "best"}[verb]
    start = {"sum": "0", "count": "0", "product": "1"}.get(verb, "None")
    words = {"sum": "the sum of", "count": "the number of", "product": "the product of", "largest": "the largest of", "smallest": "the smallest of"}[verb]
    sentences = [f"Return {words} the {xs} that are {cwords}.", f"Given a list of {xs}, compute {words} all elements that are {cwords}.",
                 f"Calculate {words} those {xs} which are {cwords}."]
    if start == "None":
        sign = ">" if verb == "largest" else "<"
        sentences = [s[:-1] + ", or None if there are none." for s in sentences]
        body = [f"{t} = None", f"for {x} in {xs}:", f"    if {test}:", f"        if {t} is None or {x} {sign} {t}:", f"            {t} = {x}", f"return {t}"]
    else:
        step = {"sum": f"{t} += {x}", "count": f"{t} += 1", "product": f"{t} *= {x}"}[verb]
        loop = [f"{t} = {start}", f"for {x} in {xs}:", f"    if {test}:", f"        {step}", f"return {t}"]
        short = {"sum": f"return sum({x} for {x} in {xs} if {test})", "count": f"return sum(1 for {x} in {xs} if {test})"}.get(verb)
        body = p([loop, loop, [short] if short else loop])
    name = p([f"{verb}_{cname}", f"{verb}_of_{cname}_{xs}", f"{verb}_{cname}_{xs}", f"{cname}_{verb}"])
    kind = "int" if start != "None" else "Optional[int]"
    return Draft(name, [(xs, "List[int]")] + [(n, "int") for n in names], kind, sentences, body, lambda: with_extra(p, names, [numbers_example(p)]))


def list_all_any(p):
    xs, (cname, cwords, test) = p(NUMBERS), p(CONDITIONS)
    x, every = SINGLE[xs], p([True, False])
    test = test.format(x=x)
    names = extra(test)
    flipped = f"not ({test})" if not re.fullmatch(r"\w+ [<>] \w+", test) else test.replace(">", "<=") if ">" in test else test.replace("<", ">=")
    if every:
        body = p([[f"for {x} in {xs}:", f"    if {flipped}:", "        return False", "return True"], [f"return all({test} for {x} in {xs})"]])
        sentences = [f"Return True if all of the {xs} are {cwords}, and False otherwise.", f"Check whether every element of {xs} is {cwords}."]
    else:
        body = p([[f"for {x} in {xs}:", f"    if {test}:", "        return True", "return False"], [f"return any({test} for {x} in {xs})"]])
        sentences = [f"Return True if any of the {xs} is {cwords}, and False otherwise.", f"Check if at least one element of {xs} is {cwords}."]
    name = p([f"{'all' if every else 'any'}_{cname}", f"is_{'all' if every else 'any'}_{cname}", f"has_{'only_' if every else ''}{cname}"])
    return Draft(name, [(xs, "List[int]")] + [(n, "int") for n in names], "bool", sentences, body, lambda: with_extra(p, names, [numbers_example(p)]))


def text_count(p):
    s, (lname, lwords, test) = p(TEXTS), p(LETTERS)
    c, kind = p(["c", "char", "ch", "letter"]), p(["count", "remove", "keep", "has"])
    test = test.format(c=c)
    if kind == "count":
        name, result = p([f"count_{lname}", f"{lname}_count", f"number_of_{lname}"]), "int"
        sentences = [f"Count the {lwords} in the given {s}.", f"Return the number of {lwords} in {s}.", f"How many {lwords} are there in the {s}?"]
        body = p([["count = 0", f"for {c} in {s}:", f"    if {test}:", "        count += 1", "return count"], [f"return sum(1 for {c} in {s} if {test})"]])
    elif kind == "has":
        name, result = p([f"has_{lname}", f"contains_{lname}"]), "bool"
        sentences = [f"Return True if the {s} contains {lwords}, and False otherwise.", f"Check whether there are any {lwords} in {s}."]
        body = p([[f"for {c} in {s}:", f"    if {test}:", "        return True", "return False"], [f"return any({test} for {c} in {s})"]])
    else:
        name, result = p([f"{kind}_{lname}", f"{kind}_all_{lname}"]), "str"
        sentences = [f"{'Remove all' if kind == 'remove' else 'Keep only the'} {lwords} {'from' if kind == 'remove' else 'of'} the {s}.",
                     f"Return the {s} {'without its' if kind == 'remove' else 'reduced to its'} {lwords}."]
        test = f"not ({test})" if kind == "remove" else test
        body = p([["result = ''", f"for {c} in {s}:", f"    if {test}:", f"        result += {c}", "return result"],
                  [f"return ''.join({c} for {c} in {s} if {test})"]])
    return Draft(name, [(s, "str")], result, sentences, body, lambda: [p([str.title, str.upper, str])(text_example(p))])


def words_filter(p):
    ws = p(WORDS)
    w = SINGLE[ws]
    name, words, test, arguments = p([
        ("longer_than", "longer than n characters", f"len({w}) > n", ["n"]), ("shorter_than", "shorter than n characters", f"len({w}) < n", ["n"]),
        ("with_prefix", "that start with the given prefix", f"{w}.startswith(prefix)", ["prefix"]),
        ("with_suffix", "that end with the given suffix", f"{w}.endswith(suffix)", ["suffix"]),
        ("with_letter", "that contain the given letter", f"letter in {w}", ["letter"]),
        ("palindromes", "that are palindromes", f"{w} == {w}[::-1]", []), ("of_even_length", "of even length", f"len({w}) % 2 == 0", [])])
    count = p([True, False])
    sentences = [f"{'Count' if count else 'Return'} the {ws} {words}.", f"From a list of {ws}, {'count those' if count else 'return the ones'} {words}."]
    if count:
        body = p([["count = 0", f"for {w} in {ws}:", f"    if {test}:", "        count += 1", "return count"], [f"return sum(1 for {w} in {ws} if {test})"]])
    else:
        body = p([["result = []", f"for {w} in {ws}:", f"    if {test}:", f"        result.append({w})", "return result"],
                  [f"return [{w} for {w} in {ws} if {test}]"]])

    def example():
        ex = words_example(p)
        given = {"n": p.number(2, 6), "prefix": ex[0][:1], "suffix": ex[0][-1:], "letter": p(list(ex[0]))}
        return [ex] + [given[a] for a in arguments]
    return Draft(f"{'count_' if count else p(['', 'filter_', 'find_'])}{ws}_{name}", [(ws, "List[str]")] + [(a, "int" if a == "n" else "str") for a in arguments],
                 "int" if count else "List[str]", sentences, body, example)


def words_map(p):
    ws = p(WORDS)
    w = SINGLE[ws]
    name, words, value, kind = p([("lengths", "the length of each", f"len({w})", "List[int]"), ("capitalized", "each capitalized", f"{w}.capitalize()", "List[str]"),
                                  ("upper", "each in upper case", f"{w}.upper()", "List[str]"), ("reversed", "each reversed", f"{w}[::-1]", "List[str]"),
                                  ("first_letters", "the first letter of each", f"{w}[0]", "List[str]"), ("doubled", "each written twice", f"{w} + {w}", "List[str]")])
    body = p([["result = []", f"for {w} in {ws}:", f"    result.append({value})", "return result"], [f"return [{value} for {w} in {ws}]"]])
    return Draft(p([f"{ws}_{name}", f"{name}_{ws}", f"get_{name}"]), [(ws, "List[str]")], kind,
                 [f"Return a list of the {ws}, {words}.", f"Given a list of {ws}, return {words} {w}." if words.startswith("the") else
                  f"Given a list of {ws}, return them with {words}."], body, lambda: [words_example(p)])


# name, parameters, result, sentences, bodies, example
def fixed(p):
    """Well-known small functions; {a} is a name from the first list of each."""
    n = p(["n", "number", "num", "x", "value"])
    xs, ys, s, ws = p(NUMBERS), p(["other", "b", "second", "lst2"]), p(TEXTS), p(WORDS)
    x, w = SINGLE[xs], SINGLE[ws]
    few, one = (lambda: [numbers_example(p, 0, 30)]), (lambda: [p.number(1, 40)])
    txt, wrd = (lambda: [text_example(p)]), (lambda: [words_example(p)])
    table = [
        ("factorial", [(n, "int")], "int", [f"Return the factorial of {n}.", f"Compute 1 * 2 * ... * {n}."],
         [["result = 1", f"for i in range(2, {n} + 1):", "    result *= i", "return result"], [f"if {n} <= 1:", "    return 1", f"return {n} * factorial({n} - 1)"]], lambda: [p.number(1, 9)]),
        ("fibonacci", [(n, "int")], "int", [f"Return the {n}-th Fibonacci number.", "Each number is the sum of the two before it."],
         [["a, b = 0, 1", f"for _ in range({n}):", "    a, b = b, a + b", "return a"], [f"if {n} < 2:", f"    return {n}", f"return fibonacci({n} - 1) + fibonacci({n} - 2)"]], lambda: [p.number(1, 14)]),
        ("is_prime", [(n, "int")], "bool", [f"Return True if {n} is a prime number, and False otherwise.", "Check if a given number is prime."],
         [[f"if {n} < 2:", "    return False", f"for i in range(2, {n}):", f"    if {n} % i == 0:", "        return False", "return True"],
          [f"if {n} < 2:", "    return False", "i = 2", f"while i * i <= {n}:", f"    if {n} % i == 0:", "        return False", "    i += 1", "return True"]], one),
        ("divisors", [(n, "int")], "List[int]", [f"Return all divisors of {n} in ascending order.", "List the numbers that divide the given number."],
         [["result = []", f"for i in range(1, {n} + 1):", f"    if {n} % i == 0:", "        result.append(i)", "return result"], [f"return [i for i in range(1, {n} + 1) if {n} % i == 0]"]], one),
        ("prime_factors", [(n, "int")], "List[int]", [f"Return the prime factors of {n} from smallest to largest, each as often as it divides {n}."],
         [["factors = []", "i = 2", f"while i * i <= {n}:", f"    while {n} % i == 0:", "        factors.append(i)", f"        {n} //= i", "    i += 1", f"if {n} > 1:", f"    factors.append({n})", "return factors"]], lambda: [p.number(2, 200)]),
        ("digit_sum", [(n, "int")], "int", [f"Return the sum of the digits of {n}.", "Add up the decimal digits of a non-negative integer."],
         [["total = 0", f"while {n} > 0:", f"    total += {n} % 10", f"    {n} //= 10", "return total"], [f"return sum(int(digit) for digit in str({n}))"]], lambda: [p.number(5, 9999)]),
        ("count_digits", [(n, "int")], "int", [f"Return how many digits {n} has."], [[f"return len(str({n}))"], ["count = 1", f"while {n} >= 10:", f"    {n} //= 10", "    count += 1", "return count"]], lambda: [p.number(1, 99999)]),
        ("reverse_number", [(n, "int")], "int", [f"Return {n} with its digits in reverse order."], [[f"return int(str({n})[::-1])"]], lambda: [p.number(1, 9999)]),
        ("to_binary", [(n, "int")], "str", [f"Return the binary representation of {n} as a string."],
         [[f"if {n} == 0:", "    return '0'", "digits = ''", f"while {n} > 0:", f"    digits = str({n} % 2) + digits", f"    {n} //= 2", "return digits"], [f"return bin({n})[2:]"]], one),
        ("is_power_of_two", [(n, "int")], "bool", [f"Check whether {n} is a power of two."], [[f"if {n} < 1:", "    return False", f"while {n} % 2 == 0:", f"    {n} //= 2", f"return {n} == 1"], [f"return {n} > 0 and {n} & ({n} - 1) == 0"]], one),
        ("gcd", [("a", "int"), ("b", "int")], "int", ["Return the greatest common divisor of two integers a and b."], [["while b:", "    a, b = b, a % b", "return a"]], lambda: [p.number(2, 60), p.number(2, 60)]),
        ("lcm", [("a", "int"), ("b", "int")], "int", ["Return the least common multiple of a and b."], [["x, y = a, b", "while y:", "    x, y = y, x % y", "return a * b // x"]], lambda: [p.number(2, 20), p.number(2, 20)]),
        ("power", [("base", "int"), ("exponent", "int")], "int", ["Raise base to the power of exponent."], [["result = 1", "for _ in range(exponent):", "    result *= base", "return result"], ["return base ** exponent"]], lambda: [p.number(2, 6), p.number(0, 6)]),
        ("collatz", [(n, "int")], "List[int]", [f"Return the Collatz sequence that starts at {n} and ends at 1.", "An even number is halved, an odd one is multiplied by 3 and 1 is added."],
         [[f"sequence = [{n}]", f"while {n} != 1:", f"    if {n} % 2 == 0:", f"        {n} = {n} // 2", "    else:", f"        {n} = 3 * {n} + 1", f"    sequence.append({n})", "return sequence"]], lambda: [p.number(2, 12)]),
        ("sum_to_n", [(n, "int")], "int", [f"Return the sum of the numbers from 1 to {n}."], [[f"return sum(range(1, {n} + 1))"], [f"return {n} * ({n} + 1) // 2"]], one),
        ("squares_up_to", [(n, "int")], "List[int]", [f"Return the squares of the numbers from 1 to {n}."], [[f"return [i * i for i in range(1, {n} + 1)]"]], lambda: [p.number(1, 9)]),
        ("fizz_buzz", [(n, "int")], "List[str]", [f"Count from 1 to {n}, with 'Fizz' for multiples of 3, 'Buzz' for multiples of 5 and 'FizzBuzz' for both."],
         [["result = []", f"for i in range(1, {n} + 1):", "    if i % 15 == 0:", "        result.append('FizzBuzz')", "    elif i % 3 == 0:", "        result.append('Fizz')", "    elif i % 5 == 0:", "        result.append('Buzz')", "    else:", "        result.append(str(i))", "return result"]], lambda: [p.number(3, 7)]),
        ("mean", [(xs, "List[float]")], "float", [f"Return the mean of the {xs}.", f"Compute the average of a list of {xs}."], [[f"return sum({xs}) / len({xs})"], ["total = 0.0", f"for {x} in {xs}:", f"    total += {x}", f"return total / len({xs})"]], lambda: [[p.number(1, 9) * 2 for _ in range(4)]]),
        ("median", [(xs, "List[int]")], "float", [f"Return the median of the {xs}."],
         [[f"ordered = sorted({xs})", "middle = len(ordered) // 2", "if len(ordered) % 2 == 1:", "    return ordered[middle]", "return (ordered[middle - 1] + ordered[middle]) / 2"]], few),
        ("largest", [(xs, "List[int]")], "int", [f"Return the largest of the {xs}.", f"Return maximum element in the list of {xs}."], [[f"best = {xs}[0]", f"for {x} in {xs}:", f"    if {x} > best:", f"        best = {x}", "return best"], [f"return max({xs})"]], few),
        ("second_largest", [(xs, "List[int]")], "Optional[int]", [f"Return the second largest of the {xs}, or None if there is no such element."], [[f"ordered = sorted(set({xs}))", "if len(ordered) < 2:", "    return None", "return ordered[-2]"]], few),
        ("running_total", [(xs, "List[int]")], "List[int]", [f"Return the running totals of the {xs}."], [["result = []", "total = 0", f"for {x} in {xs}:", f"    total += {x}", "    result.append(total)", "return result"]], few),
        ("differences", [(xs, "List[int]")], "List[int]", [f"Return the differences between neighbors in the list of {xs}."], [[f"return [{xs}[i + 1] - {xs}[i] for i in range(len({xs}) - 1)]"], ["result = []", f"for i in range(1, len({xs})):", f"    result.append({xs}[i] - {xs}[i - 1])", "return result"]], few),
        ("unique", [(xs, "List[int]")], "List[int]", [f"Return the {xs} without duplicates, in the order of their first occurrence.", "Remove repeated elements from a list."],
         [["seen = set()", "result = []", f"for {x} in {xs}:", f"    if {x} not in seen:", f"        seen.add({x})", f"        result.append({x})", "return result"], ["result = []", f"for {x} in {xs}:", f"    if {x} not in result:", f"        result.append({x})", "return result"]], lambda: [numbers_example(p, 0, 6)]),
        ("duplicates", [(xs, "List[int]")], "List[int]", [f"Return the {xs} that occur more than once."], [["seen = set()", "repeated = set()", f"for {x} in {xs}:", f"    if {x} in seen:", f"        repeated.add({x})", f"    seen.add({x})", "return sorted(repeated)"]], lambda: [numbers_example(p, 0, 5)]),
        ("most_common", [(xs, "List[int]")], "int", [f"Return the element of {xs} that occurs most often."],
         [["counts = {}", f"for {x} in {xs}:", f"    counts[{x}] = counts.get({x}, 0) + 1", "return max(counts, key=counts.get)"]], lambda: [numbers_example(p, 0, 5)]),
        ("count_occurrences", [(xs, "List[int]")], "Dict[int, int]", [f"Count how often each of the {xs} occurs and return a dictionary."], [["counts = {}", f"for {x} in {xs}:", f"    if {x} in counts:", f"        counts[{x}] += 1", "    else:", f"        counts[{x}] = 1", "return counts"], ["counts = {}", f"for {x} in {xs}:", f"    counts[{x}] = counts.get({x}, 0) + 1", "return counts"]], lambda: [numbers_example(p, 0, 5)]),
        ("is_sorted", [(xs, "List[int]")], "bool", [f"Return True if the {xs} are in ascending order."], [[f"for i in range(len({xs}) - 1):", f"    if {xs}[i] > {xs}[i + 1]:", "        return False", "return True"], [f"return {xs} == sorted({xs})"]], few),
        ("rotate", [(xs, "List[int]"), ("k", "int")], "List[int]", [f"Rotate the list of {xs} to the right by k places."], [[f"k = k % len({xs})", f"return {xs}[-k:] + {xs}[:-k]"]], lambda: [numbers_example(p), p.number(1, 4)]),
        ("chunks", [(xs, "List[int]"), ("size", "int")], "List[List[int]]", [f"Split the list of {xs} into pieces of the given size."], [["result = []", f"for i in range(0, len({xs}), size):", f"    result.append({xs}[i:i + size])", "return result"], [f"return [{xs}[i:i + size] for i in range(0, len({xs}), size)]"]], lambda: [numbers_example(p), p.number(2, 3)]),
        ("has_pair_with_sum", [(xs, "List[int]"), ("target", "int")], "bool", [f"Check if two different elements of {xs} add up to the target."],
         [[f"for i in range(len({xs})):", f"    for j in range(i + 1, len({xs})):", f"        if {xs}[i] + {xs}[j] == target:", "            return True", "return False"], ["seen = set()", f"for {x} in {xs}:", f"    if target - {x} in seen:", "        return True", f"    seen.add({x})", "return False"]], lambda: [numbers_example(p, 0, 9), p.number(4, 14)]),
        ("closest_pair", [(xs, "List[int]")], "int", [f"Return the smallest distance between two of the {xs}."], [[f"ordered = sorted({xs})", "best = ordered[1] - ordered[0]", "for i in range(1, len(ordered) - 1):", "    best = min(best, ordered[i + 1] - ordered[i])", "return best"]], few),
        ("bubble_sort", [(xs, "List[int]")], "List[int]", [f"Sort the {xs} in ascending order."], [[f"result = list({xs})", "for i in range(len(result)):", "    for j in range(len(result) - 1 - i):", "        if result[j] > result[j + 1]:", "            result[j], result[j + 1] = result[j + 1], result[j]", "return result"], [f"return sorted({xs})"]], few),
        ("binary_search", [(xs, "List[int]"), ("target", "int")], "int", [f"Return the position of the target in the sorted list of {xs}, or -1."],
         [["low = 0", f"high = len({xs}) - 1", "while low <= high:", "    middle = (low + high) // 2", f"    if {xs}[middle] == target:", "        return middle", f"    if {xs}[middle] < target:", "        low = middle + 1", "    else:", "        high = middle - 1", "return -1"]], lambda: (lambda a: [a, p(a)])(sorted(set(numbers_example(p))))),
        ("merge_sorted", [(xs, "List[int]"), (ys, "List[int]")], "List[int]", ["Merge two sorted lists into one sorted list."],
         [["result = []", "i = j = 0", f"while i < len({xs}) and j < len({ys}):", f"    if {xs}[i] <= {ys}[j]:", f"        result.append({xs}[i])", "        i += 1", "    else:", f"        result.append({ys}[j])", "        j += 1", f"return result + {xs}[i:] + {ys}[j:]"]], lambda: [sorted(numbers_example(p)), sorted(numbers_example(p))]),
        ("common_elements", [(xs, "List[int]"), (ys, "List[int]")], "List[int]", ["Return the sorted elements that occur in both lists."], [[f"return sorted(set({xs}) & set({ys}))"], ["result = []", f"for {x} in {xs}:", f"    if {x} in {ys} and {x} not in result:", f"        result.append({x})", "return sorted(result)"]], lambda: [numbers_example(p, 0, 9), numbers_example(p, 0, 9)]),
        ("dot_product", [(xs, "List[int]"), (ys, "List[int]")], "int", ["Return the dot product of two lists of the same length."], [["total = 0", f"for a, c in zip({xs}, {ys}):", "    total += a * c", "return total"], [f"return sum(a * c for a, c in zip({xs}, {ys}))"]], lambda: [[p.number(0, 9) for _ in range(3)], [p.number(0, 9) for _ in range(3)]]),
        ("interleave", [(xs, "List[int]"), ("delimiter", "int")], "List[int]", [f"Put the delimiter between each two consecutive {xs}."],
         [[f"if not {xs}:", "    return []", "result = []", f"for {x} in {xs}[:-1]:", f"    result.append({x})", "    result.append(delimiter)", f"result.append({xs}[-1])", "return result"]], lambda: [numbers_example(p), p.number(0, 9)]),
        ("flatten", [("nested", "List[List[int]]")], "List[int]", ["Flatten a list of lists into one list."], [["result = []", "for part in nested:", "    for item in part:", "        result.append(item)", "return result"], ["return [item for part in nested for item in part]"]], lambda: [[[p.number(0, 9) for _ in range(p.number(1, 3))] for _ in range(3)]]),
        ("transpose", [("matrix", "List[List[int]]")], "List[List[int]]", ["Transpose a matrix that is given as a list of rows."], [["return [list(column) for column in zip(*matrix)]"], ["result = []", "for j in range(len(matrix[0])):", "    result.append([row[j] for row in matrix])", "return result"]], lambda: [[[p.number(0, 9) for _ in range(2)] for _ in range(3)]]),
        ("row_sums", [("matrix", "List[List[int]]")], "List[int]", ["Return the sum of each row of a matrix."], [["return [sum(row) for row in matrix]"]], lambda: [[[p.number(0, 9) for _ in range(3)] for _ in range(2)]]),
        ("reverse", [(s, "str")], "str", [f"Return the {s} reversed."], [[f"return {s}[::-1]"], ["result = ''", f"for c in {s}:", "    result = c + result", "return result"]], txt),
        ("is_palindrome", [(s, "str")], "bool", [f"Check if the given {s} is a palindrome.", f"Return True if {s} reads the same forwards and backwards."],
         [[f"return {s} == {s}[::-1]"], [f"for i in range(len({s}) // 2):", f"    if {s}[i] != {s}[-1 - i]:", "        return False", "return True"]], lambda: [p(["level", "radar", "noon", "civic"] + VOCABULARY[:9])]),
        ("reverse_words", [(s, "str")], "str", [f"Reverse the order of the words in the {s}."], [[f"return ' '.join({s}.split()[::-1])"], [f"words = {s}.split(' ')", "words.reverse()", "return ' '.join(words)"]], txt),
        ("count_words", [(s, "str")], "int", [f"Return the number of words in the {s}."], [[f"return len({s}.split())"]], txt),
        ("longest_word", [(s, "str")], "str", [f"Return the longest word of the {s}; the first of equals."], [["best = ''", f"for word in {s}.split():", "    if len(word) > len(best):", "        best = word", "return best"], [f"return max({s}.split(), key=len)"]], txt),
        ("capitalize_words", [(s, "str")], "str", [f"Capitalize the first letter of each word in the {s}."], [[f"return ' '.join(word.capitalize() for word in {s}.split(' '))"]], txt),
        ("letter_counts", [(s, "str")], "Dict[str, int]", [f"Count how often each character occurs in the {s}."], [["counts = {}", f"for c in {s}:", "    counts[c] = counts.get(c, 0) + 1", "return counts"]], lambda: [p(VOCABULARY)]),
        ("are_anagrams", [(s, "str"), ("other", "str")], "bool", ["Check if two words are anagrams of each other."], [[f"return sorted({s}) == sorted(other)"]], lambda: p([["listen", "silent"], ["stone", "notes"], ["cat", "dog"], ["night", "thing"]])),
        ("caesar", [(s, "str"), ("shift", "int")], "str", [f"Encode the {s} by moving each lowercase letter forward in the alphabet by shift."],
         [["result = ''", f"for c in {s}:", "    if c.islower():", "        result += chr((ord(c) - ord('a') + shift) % 26 + ord('a'))", "    else:", "        result += c", "return result"]], lambda: [p(VOCABULARY), p.number(1, 9)]),
        ("run_lengths", [(s, "str")], "str", [f"Compress the {s} by writing each run of equal characters as the character and its length."],
         [["result = ''", "i = 0", f"while i < len({s}):", "    j = i", f"    while j < len({s}) and {s}[j] == {s}[i]:", "        j += 1", f"    result += {s}[i] + str(j - i)", "    i = j", "return result"]], lambda: ["".join(p("abc") * p.number(1, 3) for _ in range(3))]),
        ("is_balanced", [(s, "str")], "bool", [f"Check whether every opening parenthesis in the {s} is closed, and in the right order."],
         [["depth = 0", f"for c in {s}:", "    if c == '(':", "        depth += 1", "    elif c == ')':", "        depth -= 1", "    if depth < 0:", "        return False", "return depth == 0"]], lambda: [p(["()", "(())", "())", "(()())", "(", ")(", "()()"])]),
        ("max_depth", [(s, "str")], "int", [f"Return the deepest level of nesting of parentheses in the {s}."], [["depth = 0", "deepest = 0", f"for c in {s}:", "    if c == '(':", "        depth += 1", "        deepest = max(deepest, depth)", "    elif c == ')':", "        depth -= 1", "return deepest"]], lambda: [p(["()", "(())", "((()))", "(()())", "()()"])]),
        ("swap_case", [(s, "str")], "str", [f"Swap lowercase letters of the {s} to uppercase and the other way around."], [["result = ''", f"for c in {s}:", "    if c.isupper():", "        result += c.lower()", "    else:", "        result += c.upper()", "return result"], [f"return {s}.swapcase()"]], lambda: [text_example(p).title()]),
        ("prefixes", [(s, "str")], "List[str]", [f"Return all prefixes of the {s} from shortest to longest."], [["result = []", f"for i in range(len({s})):", f"    result.append({s}[:i + 1])", "return result"], [f"return [{s}[:i] for i in range(1, len({s}) + 1)]"]], lambda: [p(VOCABULARY)]),
        ("common_prefix", [(s, "str"), ("other", "str")], "str", ["Return the longest prefix that two strings share."], [["result = ''", f"for a, b in zip({s}, other):", "    if a != b:", "        break", "    result += a", "return result"]], lambda: [p(["candle", "cannot", "canal"]), p(["candy", "cane", "cat"])]),
        ("longest", [(ws, "List[str]")], "Optional[str]", [f"Return the longest of the {ws}, the first one in case of a tie, or None for an empty list."], [[f"if not {ws}:", "    return None", f"best = {ws}[0]", f"for {w} in {ws}:", f"    if len({w}) > len(best):", f"        best = {w}", "return best"]], wrd),
        ("concatenate", [(ws, "List[str]")], "str", [f"Concatenate the {ws} into a single string."], [[f"return ''.join({ws})"], ["result = ''", f"for {w} in {ws}:", f"    result += {w}", "return result"]], wrd),
        ("group_by_length", [(ws, "List[str]")], "Dict[int, List[str]]", [f"Group the {ws} by their length."], [["groups = {}", f"for {w} in {ws}:", f"    if len({w}) not in groups:", f"        groups[len({w})] = []", f"    groups[len({w})].append({w})", "return groups"], ["groups = {}", f"for {w} in {ws}:", f"    groups.setdefault(len({w}), []).append({w})", "return groups"]], wrd),
        ("sort_by_length", [(ws, "List[str]")], "List[str]", [f"Sort the {ws} by length, and those of the same length by the alphabet."], [[f"return sorted({ws}, key=lambda {w}: (len({w}), {w}))"]], wrd),
        ("invert", [("mapping", "Dict[str, int]")], "Dict[int, str]", ["Swap the keys and the values of a dictionary."], [["result = {}", "for key, value in mapping.items():", "    result[value] = key", "return result"], ["return {value: key for key, value in mapping.items()}"]], lambda: [{w: i for i, w in enumerate(words_example(p))}]),
        ("total_price", [("basket", "Dict[str, int]"), ("prices", "Dict[str, int]")], "int", ["Return the total price of the basket, which says how many pieces there are of each item."], [["total = 0", "for item, count in basket.items():", "    total += count * prices[item]", "return total"]], lambda: [{"apple": 2, "pear": p.number(1, 5)}, {"apple": p.number(1, 9), "pear": 3}]),
        ("clamp", [(n, "int"), ("low", "int"), ("high", "int")], "int", [f"Limit {n} to the range from low to high."], [[f"if {n} < low:", "    return low", f"if {n} > high:", "    return high", f"return {n}"], [f"return max(low, min({n}, high))"]], lambda: [p.number(0, 20), 5, 15]),
        ("triangle_area", [("a", "float"), ("h", "float")], "float", ["Given the length of a side and the height, return the area of a triangle."], [["return a * h / 2.0"]], lambda: [p.number(1, 9), p.number(1, 9)]),
        ("celsius_to_fahrenheit", [("celsius", "float")], "float", ["Convert a temperature from Celsius to Fahrenheit."], [["return celsius * 9 / 5 + 32"]], lambda: [p.number(0, 8) * 5]),
        ("is_leap_year", [("year", "int")], "bool", ["Return True if the year is a leap year."], [["if year % 400 == 0:", "    return True", "if year % 100 == 0:", "    return False", "return year % 4 == 0"]], lambda: [p.number(1900, 2030)]),
        ("grade", [("score", "int")], "str", ["Return the letter for a score: A from 90 points, B from 80, C from 70, otherwise F."], [["if score >= 90:", "    return 'A'", "elif score >= 80:", "    return 'B'", "elif score >= 70:", "    return 'C'", "else:", "    return 'F'"]], lambda: [p.number(50, 100)]),
        ("to_roman", [(n, "int")], "str", [f"Write {n} as a Roman numeral."], [["pairs = [(10, 'X'), (9, 'IX'), (5, 'V'), (4, 'IV'), (1, 'I')]", "result = ''", "for worth, letters in pairs:", f"    while {n} >= worth:", "        result += letters", f"        {n} -= worth", "return result"]], lambda: [p.number(1, 39)]),
    ]
    name, parameters, result, sentences, bodies, examples = p(table)
    prefix = p(["", "", "", "get_", "compute_", "find_"]) if not re.match(r"is_|has_|are_|get_|count_|to_", name) and not any(name + "(" in line for b in bodies for line in b) else ""
    return Draft(prefix + name, parameters, result, sentences, p(bodies), examples)


MAKERS = [list_to_list, list_to_number, list_all_any, text_count, words_filter, words_map, fixed, fixed, fixed, fixed]
NOTES = ["You may assume that the list is not empty.", "The input is never changed.", "The order of the elements is kept.", "Assume that the arguments are valid.",
         "An empty input gives an empty result or zero.", "Both upper and lower case may occur.", "Do not use any library.", "The result is a new object."]


def docstring(p, d, shown):
    """Lines of the docstring, in one of the forms that people use."""
    sentences = list(d.sentences)
    first = sentences.pop(int(p.random() * len(sentences)))
    more = [p(NOTES)] if p.random() < 0.25 else sentences[:1] if p.random() < 0.3 else []
    style = int(p.random() * 6)
    if style == 4:
        examples = [f"{p(['Example', 'Examples', 'For example'])}:"] + [f"{call} {p(['=>', '==>', '➞', '->'])} {result}" for call, result in shown]
    elif style == 5:
        examples = [f"For {call} the result should be {result}." for call, result in shown]
    else:
        examples = [line for call, result in shown for line in (f">>> {call}", result)]
    quote = '"""' if p.random() < 0.93 else "'''"
    lines = [first] + more + ([""] if style in (2, 3) else []) + examples
    if style == 3:
        return [quote] + lines + [quote]
    return [quote + (" " if style in (0, 1) else "") + lines[0]] + lines[1:] + [quote]


def make_function(p):
    """(import line or "", source of a function), or None where an example fails."""
    d = p(MAKERS)(p)
    typed = p.random() < 0.7
    hints = [f"{n}: {t}" if typed else n for n, t in d.parameters]
    head = f"def {d.name}({', '.join(hints)}){' -> ' + d.result if typed else ''}:"
    scope = {"List": List, "Dict": Dict, "Optional": Optional}
    body = "\n".join("    " + line for line in d.body) + "\n"
    exec(f"{head}\n{body}", scope)  # our own template's text
    shown = []
    for _ in range(p.number(1, 3)):
        arguments = d.examples()
        call = f"{d.name}({', '.join(map(repr, arguments))})"
        try:
            result = scope[d.name](*arguments)
        except (IndexError, ValueError, KeyError, ZeroDivisionError):
            return None
        if call not in [c for c, _ in shown]:
            shown.append((call, repr(result)))
    doc = "\n".join("    " + line if line else "" for line in docstring(p, d, shown))
    needed = [n for n in ("Dict", "List", "Optional") if typed and re.search(rf"\b{n}\b", head)]
    return f"from typing import {', '.join(needed)}" if needed else "", f"{head}\n{doc}\n{body}"


def make_document(p, count):
    """`count` different functions, one behind the other, as a file has them."""
    functions, names = [], set()
    while len(functions) < count:
        made = make_function(p)
        name = made[1].split("(", 1)[0] if made else None
        if made and name not in names:
            names.add(name)
            functions.append(made)
    needed = sorted({name for line, _ in functions for name in line.replace("from typing import ", "").split(", ") if name})
    start = f"from typing import {', '.join(needed)}\n\n\n" if needed else p(["", "\n\n"])
    return start + "\n\n".join(source for _, source in functions)
