"""Make the sample text of this folder: code, word problems, service dialogues and short chats, all from templates.

Usage: make_sample.py [--out DIR] [--scale N] [--seed S] (writes {code,math,agent,chat}.jsonl). The text is this project's own
(Apache-2.0), so that the quickstart needs no network. It resembles data/prompts and shares no 13 words with it: a test
runs us-data over both. The same bytes on every machine: only random.random() of a fixed seed is used.
"""
import argparse
import json
import pathlib
import random

TEXT = pathlib.Path(__file__).parent / "text"
ROWS = {"code": 420, "math": 640, "agent": 230, "chat": 300}

NAMES = ["Amara", "Ben", "Chloe", "Dario", "Elif", "Frank", "Greta", "Hugo", "Iris", "Jonas", "Kira", "Leo", "Mara", "Nils",
         "Olga", "Paul", "Quinn", "Ruth", "Sami", "Tara", "Umar", "Vera", "Wim", "Yara", "Zoe"]
THINGS = ["apples", "pencils", "stickers", "books", "shells", "stamps", "cookies", "candles", "buttons", "postcards", "coins",
          "tulips", "bricks", "bottles", "tickets", "oranges"]
PLACES = ["Lisbon", "Oslo", "Graz", "Turin", "Leeds", "Bruges", "Malmo", "Split", "Basel", "Gdansk", "Nantes", "Cork"]


class Pick:
    def __init__(self, seed):
        self.random = random.Random(seed).random

    def __call__(self, items):
        return items[int(self.random() * len(items))]

    def two(self, items):
        """Two different items."""
        first = self(items)
        return first, self([item for item in items if item != first])

    def number(self, low, high):
        return low + int(self.random() * (high - low + 1))

    def shuffled(self, items):
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.number(0, i)
            items[i], items[j] = items[j], items[i]
        return items


# -- Math: a question, reasoning with the sums worked out, and the answer behind "####" --

def math_sell(p):
    name, thing, a, b, price = p(NAMES), p(THINGS), p.number(12, 90), p.number(2, 9), p.number(2, 9)
    total = a * b
    question = p([f"{name} has {b} boxes with {a} {thing} in each box and sells all of them for ${price} each. How much money does "
                  f"{name} get?",
                  f"There are {a} {thing} in a box. {name} buys {b} boxes and sells every piece for ${price}. How many dollars "
                  f"does {name} take in?"])
    return question, f"{name} has {b} * {a} = {total} {thing}.\nAt ${price} each that is {total} * {price} = ${total * price}.\n#### {total * price}"


def math_share(p):
    (name, other), thing, each, n = p.two(NAMES), p(THINGS), p.number(3, 24), p.number(3, 9)
    eaten = p.number(1, 20)
    start = each * n + eaten
    question = p([f"{name} collected {start} {thing}. After losing {eaten} of them, {name} shares the others equally with "
                  f"{n - 1} friends. How many {thing} does each of them get?",
                  f"Out of {start} {thing}, {eaten} are broken. {name} and {other} put the good ones into {n} equal piles. How many "
                  f"are in one pile?"])
    return question, f"{start} - {eaten} = {start - eaten} {thing} are left.\nSplit into {n} parts that is {start - eaten} / {n} = {each}.\n#### {each}"


def math_walk(p):
    name, speed, hours, rest = p(NAMES), p.number(3, 25), p.number(2, 8), p.number(5, 40)
    far = speed * hours + rest
    question = p([f"{name} rides {speed} kilometers an hour for {hours} hours and then {rest} kilometers more. How far does {name} "
                  f"ride in all?",
                  f"A trip has two parts. In the first {name} travels {hours} hours at {speed} kilometers an hour, and the second "
                  f"part is {rest} kilometers long. How long is the whole trip in kilometers?"])
    return question, f"The first part is {speed} * {hours} = {speed * hours} kilometers.\nTogether with {rest} kilometers that is {speed * hours} + {rest} = {far}.\n#### {far}"


def math_percent(p):
    thing, share, tens, given = p(THINGS), p([10, 20, 25, 50]), p.number(2, 20), p.number(1, 9)
    total = tens * 20
    part = total * share // 100
    question = p([f"A shop has {total} {thing}. It sells {share} percent of them in the morning and {given} more after lunch. How many "
                  f"{thing} does it sell that day?",
                  f"Of {total} {thing}, {share} percent are red, and {given} more are painted red later. How many red {thing} are "
                  f"there then?"])
    return question, f"{share} percent of {total} is {total} * {share} / 100 = {part}.\nWith {given} more that is {part} + {given} = {part + given}.\n#### {part + given}"


def math_save(p):
    name, week, weeks, cost = p(NAMES), p.number(5, 30), p.number(4, 20), p.number(10, 90)
    total = week * weeks
    cost = min(cost, total)
    question = p([f"Every week {name} puts ${week} into a jar. After {weeks} weeks {name} buys a game for ${cost}. How much money is "
                  f"still in the jar?",
                  f"{name} earns ${week} a week by walking dogs. How many dollars remain after {weeks} weeks if a pair of gloves for "
                  f"${cost} is paid from the earnings?"])
    return question, f"In {weeks} weeks {name} gets {week} * {weeks} = ${total}.\nAfter paying ${cost} there is {total} - {cost} = ${total - cost} left.\n#### {total - cost}"


def math_times(p):
    (name, other), thing, few, factor = p.two(NAMES), p(THINGS), p.number(4, 40), p.number(2, 6)
    more = p.number(1, 15)
    many = few * factor + more
    question = f"{name} has {few} {thing}. {other} has {more} more than {factor} times as many. How many {thing} do they have together?"
    return question, f"{factor} times {few} is {few * factor}, and {more} more is {many}.\nTogether they have {few} + {many} = {few + many} {thing}.\n#### {few + many}"


MATH = [math_sell, math_share, math_walk, math_percent, math_save, math_times]

# -- Code: a function or class with its docstring, examples and body --

VERBS = {"sum": ("total", "0", "{t} += {x}", "the sum of"), "product": ("result", "1", "{t} *= {x}", "the product of"),
         "count": ("count", "0", "{t} += 1", "the number of")}
CONDITIONS = {"even": ("{x} % 2 == 0", "even"), "odd": ("{x} % 2 == 1", "odd"), "positive": ("{x} > 0", "positive"),
              "negative": ("{x} < 0", "negative"), "large": ("{x} > limit", "larger than limit"),
              "small": ("{x} < limit", "smaller than limit")}
NOUNS = ["numbers", "values", "scores", "prices", "weights", "ages", "points", "sizes", "costs", "samples"]


def evaluate(source, call):
    scope = {}
    exec(source, scope)  # our own template's text
    return repr(eval(call, scope))


def code_fold(p):
    verb, condition, noun = p(list(VERBS)), p(list(CONDITIONS)), p(NOUNS)
    target, start, step, what = VERBS[verb]
    test, adjective = CONDITIONS[condition]
    x = noun[:-1] if noun != "ages" else "age"
    limit = ", limit" if "limit" in test else ""
    name = f"{verb}_{condition}_{noun}"
    values = [p.number(-9, 20) for _ in range(p.number(3, 6))]
    body = (f"    {target} = {start}\n    for {x} in {noun}:\n        if {test.format(x=x)}:\n"
            f"            {step.format(t=target, x=x)}\n    return {target}\n")
    call = f"{name}({values}{', 5' if limit else ''})"
    result = evaluate(f"def {name}({noun}{limit}):\n{body}", call)
    return (f"def {name}({noun}{limit}):\n    \"\"\"Return {what} all {noun} that are {adjective}.\n\n    >>> {call}\n    {result}\n"
            f"    \"\"\"\n{body}")


def code_filter(p):
    condition, noun = p(list(CONDITIONS)), p(NOUNS)
    test, adjective = CONDITIONS[condition]
    x = noun[0]
    limit = ", limit" if "limit" in test else ""
    name = f"{p(['keep', 'select', 'only', 'find'])}_{condition}_{noun}"
    values = [p.number(-9, 20) for _ in range(p.number(3, 6))]
    body = p([f"    return [{x} for {x} in {noun} if {test.format(x=x)}]\n",
              f"    found = []\n    for {x} in {noun}:\n        if {test.format(x=x)}:\n            found.append({x})\n    return found\n"])
    call = f"{name}({values}{', 5' if limit else ''})"
    result = evaluate(f"def {name}({noun}{limit}):\n{body}", call)
    return (f"from typing import List\n\n\ndef {name}({noun}: List[int]{limit + ': int' if limit else ''}) -> List[int]:\n"
            f"    \"\"\"List the {noun} that are {adjective}, in their order.\n    >>> {call}\n    {result}\n    \"\"\"\n{body}")


def code_text(p):
    word = p(["anchor", "bridge", "candle", "dragon", "engine", "forest", "garden", "harbor"])
    letter = p(list(word))
    kinds = [("count_letter", "text, letter", "How often a letter occurs in a text.", f"('{word}', '{letter}')",
              "    count = 0\n    for character in text:\n        if character == letter:\n            count += 1\n    return count\n"),
             ("reverse_words", "sentence", "Turn the order of the words around.", f"('{word} and {letter}')",
              "    words = sentence.split()\n    words.reverse()\n    return ' '.join(words)\n"),
             ("first_letters", "sentence", "The first letter of each word, joined.", f"('one {word} more')",
              "    return ''.join(word[0] for word in sentence.split())\n"),
             ("is_palindrome", "text", "True when a text reads the same from both ends.", f"('{word}')",
              "    return text == text[::-1]\n"),
             ("longest_word", "sentence", "The longest word; the first of equals.", f"('a {word} or two')",
              "    best = ''\n    for word in sentence.split():\n        if len(word) > len(best):\n            best = word\n    return best\n"),
             ("without_letter", "text, letter", "Remove every occurrence of a letter.", f"('{word}', '{letter}')",
              "    return text.replace(letter, '')\n"),
             ("pad_text", "text, width", "Fill a text with dots up to a width.", f"('{word}', {p.number(7, 12)})",
              "    while len(text) < width:\n        text += '.'\n    return text\n")]
    name, arguments, summary, call, body = p(kinds)
    result = evaluate(f"def {name}({arguments}):\n{body}", name + call)
    return f"def {name}({arguments}):\n    \"\"\"{summary}\n    >>> {name}{call}\n    {result}\n    \"\"\"\n{body}"


def code_loop(p):
    n = p.number(3, 12)
    kinds = [("factorial", "n", "The product 1 * 2 * ... * n.", "    result = 1\n    for i in range(2, n + 1):\n        result *= i\n    return result\n"),
             ("fibonacci", "n", "The n-th Fibonacci number.", "    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n"),
             ("sum_of_squares", "n", "1 + 4 + 9 + ... + n * n.", "    return sum(i * i for i in range(1, n + 1))\n"),
             ("divisors", "n", "All divisors of n, ascending.", "    return [d for d in range(1, n + 1) if n % d == 0]\n"),
             ("is_prime", "n", "Whether n is a prime number.", "    if n < 2:\n        return False\n    for d in range(2, n):\n        if n % d == 0:\n            return False\n    return True\n"),
             ("to_binary", "n", "The binary digits of n as text.", "    digits = ''\n    while n > 0:\n        digits = str(n % 2) + digits\n        n //= 2\n    return digits or '0'\n"),
             ("countdown", "n", "The numbers from n down to 1.", "    return list(range(n, 0, -1))\n"),
             ("triangle", "n", "The n-th triangular number.", "    total = 0\n    while n > 0:\n        total += n\n        n -= 1\n    return total\n")]
    name, argument, summary, body = p(kinds)
    result = evaluate(f"def {name}({argument}):\n{body}", f"{name}({n})")
    return f"def {name}({argument}: int):\n    \"\"\"{summary}\n    >>> {name}({n})\n    {result}\n    \"\"\"\n{body}"


def code_class(p):
    name, field, verb = p([("Counter", "count", "add"), ("Account", "balance", "deposit"), ("Basket", "weight", "put"),
                           ("Meter", "reading", "advance"), ("Score", "points", "award"), ("Tank", "volume", "fill")])
    back = {"add": "remove", "deposit": "withdraw", "put": "take", "advance": "rewind", "award": "deduct", "fill": "drain"}[verb]
    start = p.number(0, 9)
    return (f"class {name}:\n    \"\"\"Keeps a {field} that never falls below zero.\"\"\"\n\n"
            f"    def __init__(self, {field}={start}):\n        self.{field} = {field}\n\n"
            f"    def {verb}(self, amount):\n        self.{field} += amount\n        return self.{field}\n\n"
            f"    def {back}(self, amount):\n        if amount > self.{field}:\n"
            f"            raise ValueError('not enough {field}')\n        self.{field} -= amount\n        return self.{field}\n\n"
            f"    def __repr__(self):\n        return f'{name}({{self.{field}}})'\n")


CODE = [code_fold, code_filter, code_text, code_loop, code_class]

# -- Agent: dialogues with tool results --

PRODUCTS = ["backpack", "desk lamp", "water bottle", "keyboard", "rain coat", "tent", "coffee mug", "headphones", "wall clock"]


def order_number(p):
    return f"#{p('ABCDEFGH')}{p.number(1000, 9999)}"


def message(role, content):
    return {"role": role, "content": content}


def agent_status(p):
    order, product, days = order_number(p), p(PRODUCTS), p.number(1, 6)
    city = p(PLACES)
    return [message("user", p([f"Where is my order {order}?", f"Hi, can you tell me when {order} arrives?",
                               f"I am waiting for my {product}. The order is {order}."])),
            message("tool", json.dumps({"order": order, "item": product, "status": "shipped", "city": city, "days": days})),
            message("assistant", p([f"Your {product} has been shipped from {city} and should arrive in {days} days.",
                                    f"Order {order} left {city}. The {product} will reach you in about {days} days."])),
            message("user", p(["Thank you!", "Great, thanks.", "Perfect, that is all."])),
            message("assistant", p(["You are welcome. Have a nice day!", "Happy to help. Goodbye!"]))]


def agent_cancel(p):
    order, product, price = order_number(p), p(PRODUCTS), p.number(8, 150)
    return [message("user", p([f"Please cancel order {order}.", f"I don't want the {product} any more, order {order}."])),
            message("tool", json.dumps({"order": order, "item": product, "price": price, "status": "pending"})),
            message("assistant", f"The order of the {product} for ${price} is still pending. Do you want me to cancel it?"),
            message("user", p(["Yes.", "Yes, please do.", "Go ahead."])),
            message("tool", json.dumps({"order": order, "status": "cancelled", "refund": price})),
            message("assistant", p([f"Order {order} is cancelled and ${price} will be refunded.",
                                    f"Done. You will get ${price} back for the {product}."]))]


def agent_book(p):
    (city, other), hour, price = p.two(PLACES), p.number(6, 21), p.number(20, 240)
    seats = p.number(1, 4)
    return [message("user", p([f"I need a train from {city} to {other} for {seats} people.",
                               f"Can you book {seats} seats from {city} to {other}?"])),
            message("tool", json.dumps({"from": city, "to": other, "departures": [f"{hour:02d}:15", f"{hour + 2:02d}:45"],
                                        "price": price})),
            message("assistant", f"There are trains at {hour:02d}:15 and {hour + 2:02d}:45. {seats} seats cost ${price * seats}. Which one "
                                 f"should I book?"),
            message("user", p([f"The one at {hour:02d}:15.", "The earlier one.", "The first one, please."])),
            message("tool", json.dumps({"booked": True, "departure": f"{hour:02d}:15", "seats": seats})),
            message("assistant", f"I booked {seats} seats on the train at {hour:02d}:15 from {city} to {other}.")]


def agent_exchange(p):
    order, product = order_number(p), p(PRODUCTS)
    old, new = p(["black", "white", "red"]), p(["blue", "yellow", "brown"])
    name = p(NAMES)
    return [message("user", f"I'd like to exchange my {old} {product} for a {new} one."),
            message("assistant", p(["Sure. What is your name and the number of the order?", "Of course. Which order is it, and your name?"])),
            message("user", f"{name}, {order}."),
            message("tool", json.dumps({"customer": name, "order": order, "item": product, "color": old, "available": [new]})),
            message("assistant", f"Thank you, {name}. The {product} is available in {new}. Shall I exchange it?"),
            message("user", p(["Yes, please.", "Yes."])),
            message("tool", json.dumps({"order": order, "exchanged": True, "color": new})),
            message("assistant", f"The {old} {product} of order {order} will be exchanged for a {new} one.")]


AGENT = [agent_status, agent_cancel, agent_book, agent_exchange]

# -- Chat: an instruction and its answer --

TOPICS = {"tea": ["boil fresh water", "warm the pot", "let the leaves steep for four minutes"],
          "a garden bed": ["loosen the soil", "mix in compost", "water it well"],
          "a bicycle tire": ["take off the wheel", "find the hole under water", "glue a patch on it"],
          "a salad": ["wash the leaves", "cut the vegetables", "add oil and vinegar at the end"],
          "a small fire": ["gather dry twigs", "build a loose pile", "light it from the windward side"],
          "a suitcase": ["lay out the clothes", "roll the shirts", "put the shoes at the bottom"],
          "a paper boat": ["fold the sheet in half", "turn the corners down", "pull the sides apart"],
          "a talk": ["decide on one message", "write down three points", "practise it aloud"]}
ANIMALS = {"cat": "whiskers", "hawk": "sharp eyes", "fox": "a bushy tail", "whale": "a thick layer of fat", "bee": "two pairs of wings",
           "goat": "sure feet", "swan": "a long neck", "mole": "strong claws"}


def chat_steps(p):
    topic = p(list(TOPICS))
    steps = TOPICS[topic]
    ask = p([f"How do I prepare {topic}?", f"Give me three steps for {topic}.", f"Explain in short how to get {topic} ready."])
    lead = p(["Here are three steps:", "It is simple:", "Do it like this:"])
    return ask, f"{lead}\n" + "\n".join(f"{i}. {s[0].upper()}{s[1:]}." for i, s in enumerate(steps, 1))


def chat_animal(p):
    animal, other = p.two(list(ANIMALS))
    ask = p([f"What is special about a {animal}?", f"Name one difference between a {animal} and a {other}."])
    return ask, f"A {animal} has {ANIMALS[animal]}, while a {other} has {ANIMALS[other]}."


def chat_letter(p):
    (name, other), thing, day = p.two(NAMES), p(PRODUCTS), p(["Monday", "Tuesday", "Friday", "Sunday"])
    ask = p([f"Write a note to {name} to say thanks for the {thing}. Sign it {other}.",
             f"I am {other}. Help me thank {name} for lending me a {thing}."])
    return ask, (f"Dear {name},\n\nthank you very much for the {thing}. I used it on {day} and it worked very well. I will bring it back "
                 f"soon.\n\nBest wishes,\n{other}")


def chat_list(p):
    things = sorted({p(THINGS) for _ in range(4)})
    ask = p([f"Sort these words: {', '.join(reversed(things))}.", f"Put {', '.join(reversed(things))} in alphabetical order."])
    return ask, f"In alphabetical order: {', '.join(things)}."


def chat_story(p):
    (name, friend), place, thing = p.two(NAMES), p(PLACES), p(THINGS)
    end = p(["They laughed about it for years.", "It rained all the way home.", "Nobody ever found out why."])
    ask = p([f"Tell a very short story about {name} in {place}.", f"Write three sentences about {thing} and {place}."])
    return ask, f"One morning {name} came to {place} with a bag full of {thing}. At the market {friend} wanted to buy them all. {end}"


CHAT = [chat_steps, chat_animal, chat_letter, chat_list, chat_story]


def unique(seed, makers, n):
    """n different items, the makers in turn."""
    p, seen, out, i = Pick(seed), set(), [], 0
    while len(out) < n and i < 50 * n:
        item = makers[i % len(makers)](p)
        key = json.dumps(item)
        i += 1
        if key not in seen:
            seen.add(key)
            out.append(item)
    return out


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=TEXT, help="folder to write to (text/ beside this script)")
    parser.add_argument("--scale", type=int, default=1, help="multiplies the number of documents")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other text from the same templates")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    first = 10 * args.seed
    rows = {kind: count * args.scale for kind, count in ROWS.items()}
    write(args.out / "code.jsonl", [{"text": text} for text in unique(first + 1, CODE, rows["code"])])
    write(args.out / "math.jsonl", [{"question": q, "answer": a} for q, a in unique(first + 2, MATH, rows["math"])])
    write(args.out / "agent.jsonl", [{"messages": m} for m in unique(first + 3, AGENT, rows["agent"])])
    write(args.out / "chat.jsonl",
          [{"messages": [message("user", q), message("assistant", a)]} for q, a in unique(first + 4, CHAT, rows["chat"])])


if __name__ == "__main__":
    main()
