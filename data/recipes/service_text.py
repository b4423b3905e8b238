"""Service dialogues of an imaginary shop with tool calls, all from templates (this project's own, Apache-2.0). Used by derive_text.py.

A dialogue is a list of messages as us-data reads them: {"role", "content", "tool_calls"?}.
"""
import json

FIRST = ["Aiko", "Bela", "Carla", "Dmitri", "Emeka", "Farah", "Goran", "Hana", "Ilya", "Jun", "Kofi", "Lena", "Milos", "Nadia", "Oskar",
         "Petra", "Rafael", "Selin", "Tomas", "Uma", "Viktor", "Wanda", "Yusuf", "Zora", "Anita", "Bruno", "Celia", "Daniel"]
LAST = ["Abbott", "Barros", "Castell", "Dubois", "Eklund", "Fontaine", "Grigor", "Haas", "Ibarra", "Jansen", "Keller", "Lindgren", "Moreau",
        "Novak", "Okafor", "Pereira", "Quist", "Rossi", "Sato", "Tanaka", "Ulrich", "Varga", "Weber", "Yilmaz", "Zhang"]
STREETS = ["Alder Lane", "Birch Road", "Cedar Court", "Dogwood Drive", "Elm Avenue", "Fir Street", "Grove Place", "Hazel Way", "Juniper Circle"]
CITIES = [("Boise", "ID"), ("Tulsa", "OK"), ("Salem", "OR"), ("Austin", "TX"), ("Denver", "CO"), ("Fresno", "CA"), ("Albany", "NY"),
          ("Tampa", "FL"), ("Omaha", "NE"), ("Dayton", "OH"), ("Mobile", "AL"), ("Helena", "MT")]
GOODS = {"Kettle": {"capacity": ["1L", "1.5L", "2L"], "material": ["glass", "steel", "plastic"]},
         "Desk Lamp": {"color": ["black", "silver", "white"], "power source": ["USB", "battery", "AC adapter"]},
         "Running Shoes": {"size": ["7", "8", "9", "10", "11"], "color": ["red", "blue", "black"], "sole": ["rubber", "EVA"]},
         "Backpack": {"color": ["green", "navy", "grey"], "size": ["small", "medium", "large"], "material": ["nylon", "canvas"]},
         "Keyboard": {"switch": ["clicky", "tactile", "linear"], "backlight": ["RGB", "white", "none"]},
         "Jacket": {"size": ["S", "M", "L", "XL"], "color": ["olive", "black", "yellow"], "zipper": ["full", "half"]},
         "Bicycle Helmet": {"size": ["S", "M", "L"], "color": ["white", "black"], "ventilation": ["low", "medium", "high"]},
         "Tea Set": {"pieces": ["4", "6", "8"], "pattern": ["plain", "floral", "striped"]},
         "Camera Bag": {"color": ["brown", "black"], "depth": ["10 cm", "14 cm", "18 cm"]},
         "Puzzle": {"pieces": ["500", "1000", "2000"], "theme": ["animals", "city", "space"]}}


def digits(p, n):
    return "".join(str(p.number(0, 9)) for _ in range(n))


class Customer:
    """A person with a payment method and an order."""

    def __init__(self, p):
        self.first, self.last = p(FIRST), p(LAST)
        self.city, self.state = p(CITIES)
        self.id = f"{self.first}_{self.last}_{digits(p, 4)}".lower()
        self.email = f"{self.first}.{self.last}{digits(p, 4)}@example.com".lower()
        self.address = {"address1": f"{p.number(10, 990)} {p(STREETS)}", "address2": f"Suite {p.number(100, 999)}", "city": self.city,
                        "country": "USA", "state": self.state, "zip": digits(p, 5)}
        self.method = p(["credit_card", "paypal", "gift_card"]) + "_" + digits(p, 7)
        self.order_id = f"#W{digits(p, 7)}"
        self.items = [make_item(p) for _ in range(p.number(1, 3))]
        self.status = p(["pending", "processed", "delivered", "delivered"])

    def total(self):
        return round(sum(item["price"] for item in self.items), 2)

    def order(self):
        return {"order_id": self.order_id, "user_id": self.id, "address": self.address, "items": self.items, "status": self.status,
                "payment_history": [{"transaction_type": "payment", "amount": self.total(), "payment_method_id": self.method}]}

    def profile(self):
        return {"name": {"first_name": self.first, "last_name": self.last}, "address": self.address, "email": self.email,
                "payment_methods": {self.method: {"source": self.method.rsplit("_", 1)[0], "id": self.method}}, "orders": [self.order_id]}


def make_item(p):
    name = p(list(GOODS))
    return {"name": name, "product_id": digits(p, 10), "item_id": digits(p, 10), "price": p.number(900, 45000) / 100,
            "options": {key: p(values) for key, values in GOODS[name].items()}}


def say(role, content):
    return {"role": role, "content": content}


def call(name, arguments, result):
    """The assistant's call and the tool's answer."""
    made = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name, "arguments": json.dumps(arguments)}}]}
    return [made, say("tool", result if isinstance(result, str) else json.dumps(result))]


def described(item):
    return f"{item['name']} ({', '.join(f'{key}: {value}' for key, value in item['options'].items())})"


def greet(p, c, wish):
    """Wish, authentication by email or by name and zip code."""
    out = [say("user", p([f"Hi! {wish}", f"Hello, {wish[0].lower()}{wish[1:]}", wish, f"Good morning. {wish}"]))]
    if p.number(0, 1):
        out += [say("assistant", p(["I can help you with that. Could you please give me the email address of your account?",
                                    "Of course. To find your account I need your email address first."])),
                say("user", p([f"It is {c.email}.", f"Sure, {c.email}", f"My email is {c.email}."]))]
        return out + call("find_user_id_by_email", {"email": c.email}, c.id)
    out += [say("assistant", p(["I am happy to help. Please tell me your first name, last name and zip code, or your email address.",
                                "Certainly! May I have your full name and your zip code to verify who you are?"])),
            say("user", p([f"{c.first} {c.last}, {c.address['zip']}.", f"My name is {c.first} {c.last} and my zip code is {c.address['zip']}."]))]
    return out + call("find_user_id_by_name_zip", {"first_name": c.first, "last_name": c.last, "zip": c.address["zip"]}, c.id)


def look_up(p, c, asked):
    out = []
    if asked:
        out += [say("assistant", p([f"Thank you, {c.first}. Which order is it about? Please give me the order number.",
                                    f"Thanks, {c.first}! Could you tell me the number of the order?"])),
                say("user", p([f"The order is {c.order_id}.", f"{c.order_id}", f"I think it was {c.order_id}."]))]
    return out + call("get_order_details", {"order_id": c.order_id}, c.order())


def close(p):
    if p.number(0, 2):  # as recorded dialogues end
        return [say("user", p(["Thank you for your help! ###STOP###", "Great, thank you so much! That's all. ###STOP###",
                               "No, that is all. Thank you! ###STOP###", "Thanks, you too! ###STOP###", "###STOP###"]))]
    return [say("user", p(["No, that is all. Thank you!", "Thanks, that was everything.", "Great, thank you for your help!"])),
            say("assistant", p(["You're welcome! Have a great day.", "You are welcome. Feel free to come back if you need anything else.",
                                "Glad I could help. Goodbye!"]))]


def agree(p, plan):
    return [say("assistant", f"{plan} Do you want me to go ahead (yes/no)?"), say("user", p(["Yes.", "Yes, please.", "yes, go ahead"]))]


def dialogue_status(p):
    c = Customer(p)
    out = greet(p, c, p(["I want to know where my order is.", "Can you check the status of my order?"])) + look_up(p, c, True)
    names = " and ".join(described(item) for item in c.items)
    return out + [say("assistant", f"Your order {c.order_id} with the {names} is {c.status}. The total was ${c.total()}. "
                                   "Is there anything else I can do for you?")] + close(p)


def dialogue_cancel(p):
    c = Customer(p)
    c.status = "pending"
    reason = p(["no longer needed", "ordered by mistake"])
    out = greet(p, c, f"I would like to cancel my order {c.order_id}.") + look_up(p, c, False)
    out += [say("assistant", f"Order {c.order_id} is still pending, so it can be cancelled. Is it no longer needed, or was it ordered by mistake?"),
            say("user", p([f"It is {reason}.", f"It was {reason}."]))]
    out += agree(p, f"I will cancel order {c.order_id} ({reason}) and refund ${c.total()} to {c.method}.")
    out += call("cancel_pending_order", {"order_id": c.order_id, "reason": reason}, dict(c.order(), status="cancelled", cancel_reason=reason))
    return out + [say("assistant", f"Order {c.order_id} has been cancelled, and ${c.total()} will be refunded to {c.method}. Anything else?")] + close(p)


def dialogue_return(p):
    c = Customer(p)
    c.status, item = "delivered", p(c.items)
    out = greet(p, c, p([f"I want to return the {item['name']} that I bought.", f"The {item['name']} does not suit me, I'd like to send it back."]))
    out += look_up(p, c, True)
    out += agree(p, f"I found the {described(item)} for ${item['price']}. I can start the return of this item and refund it to {c.method}.")
    out += call("return_delivered_order_items", {"order_id": c.order_id, "item_ids": [item["item_id"]], "payment_method_id": c.method},
                dict(c.order(), status="return requested", return_items=[item["item_id"]]))
    return out + [say("assistant", f"The return of the {item['name']} is requested. You will receive an email with instructions, and ${item['price']} "
                                   f"will go back to {c.method}.")] + close(p)


def dialogue_exchange(p):
    c = Customer(p)
    c.status, item = "delivered", p(c.items)
    key = p(list(item["options"]))
    other = p([value for value in GOODS[item["name"]][key] if value != item["options"][key]])
    new = dict(item, item_id=digits(p, 10), options=dict(item["options"], **{key: other}))
    out = greet(p, c, f"I'd like to exchange my {item['name']} for one with {key} {other}.") + look_up(p, c, True)
    out += call("get_product_details", {"product_id": item["product_id"]},
                {"name": item["name"], "product_id": item["product_id"], "variants": {i["item_id"]: i for i in (item, new)}})
    out += agree(p, f"The {described(new)} is available at the same price of ${item['price']}. I will exchange item {item['item_id']} for {new['item_id']}.")
    out += call("exchange_delivered_order_items", {"order_id": c.order_id, "item_ids": [item["item_id"]], "new_item_ids": [new["item_id"]],
                                                   "payment_method_id": c.method}, dict(c.order(), status="exchange requested"))
    return out + [say("assistant", f"Your exchange for the {described(new)} is on its way. You will get an email about how to send the old one back.")] + close(p)


def dialogue_address(p):
    c, new = Customer(p), Customer(p)
    c.status = "pending"
    place = f"{new.address['address1']}, {new.address['address2']}, {new.city}, {new.state} {new.address['zip']}"
    out = greet(p, c, "I moved and need to change the address of my order.") + call("get_user_details", {"user_id": c.id}, c.profile())
    out += look_up(p, c, True)
    out += [say("assistant", "What is the new address?"), say("user", p([place, f"It is {place}."]))]
    out += agree(p, f"I will send order {c.order_id} to {place}.")
    out += call("modify_pending_order_address", dict({"order_id": c.order_id}, **new.address), dict(c.order(), address=new.address))
    return out + [say("assistant", f"Done. Order {c.order_id} will be shipped to {place}. Is there anything else?")] + close(p)


def dialogue_payment(p):
    c = Customer(p)
    c.status, other = "pending", p(["credit_card", "paypal"]) + "_" + digits(p, 7)
    out = greet(p, c, p(["I want to pay for my order in another way.", "Can I change the payment method of an order?"])) + look_up(p, c, True)
    out += call("get_user_details", {"user_id": c.id}, dict(c.profile(), payment_methods={m: {"source": m.rsplit("_", 1)[0], "id": m}
                                                                                        for m in (c.method, other)}))
    out += agree(p, f"Order {c.order_id} was paid with {c.method}. I can charge the ${c.total()} to {other} instead.")
    out += call("modify_pending_order_payment", {"order_id": c.order_id, "payment_method_id": other}, dict(c.order(), payment_history=[
        {"transaction_type": "payment", "amount": c.total(), "payment_method_id": other},
        {"transaction_type": "refund", "amount": c.total(), "payment_method_id": c.method}]))
    return out + [say("assistant", f"The payment of order {c.order_id} was moved to {other}. The refund to {c.method} takes a few "
                                   "days. If you need anything else, feel free to ask!")] + close(p)


def dialogue_human(p):
    c = Customer(p)
    wish = p(["I want a discount because the parcel was late.", "The item broke after a year, and I want a new one.",
              "I need to change the address of an order that was delivered already."])
    out = greet(p, c, wish) + look_up(p, c, True)
    out += [say("assistant", p(["I'm sorry, but I cannot do that. Is there anything else that I can do for you?",
                                "I understand, but this is not possible. Would you like me to transfer you to a human agent?"])),
            say("user", p(["Please let me talk to a human.", "Then transfer me to a human agent, please.", "Can I speak to a human about this?"]))]
    return out + call("transfer_to_human_agents", {"summary": f"User {c.id}: {wish}"}, "Transfer successful")


def dialogue_two(p):
    """Status first, then a return of one of the items."""
    c = Customer(p)
    c.status, item = "delivered", p(c.items)
    out = greet(p, c, p(["I have a question about an order and maybe want to return something.", "Can you tell me what was in my last order?"]))
    out += call("get_user_details", {"user_id": c.id}, c.profile()) + look_up(p, c, False)
    listed = "\n".join(f"{i}. {described(each)}: ${each['price']}" for i, each in enumerate(c.items, 1))
    out += [say("assistant", f"Order {c.order_id} was delivered. It holds:\n\n{listed}\n\nThe total was ${c.total()}. Which item would you like to return?"),
            say("user", p([f"The {item['name']}.", f"Only the {item['name']}, please."]))]
    out += agree(p, f"I will return the {described(item)} and refund ${item['price']} to {c.method}.")
    out += call("return_delivered_order_items", {"order_id": c.order_id, "item_ids": [item["item_id"]], "payment_method_id": c.method},
                dict(c.order(), status="return requested", return_items=[item["item_id"]], return_payment_method_id=c.method))
    return out + [say("assistant", f"The return is on its way. You will get an email with instructions on how to return the {item['name']}. If you need "
                                   "anything else, feel free to ask!")] + close(p)


DIALOGUES = [dialogue_status, dialogue_cancel, dialogue_return, dialogue_exchange, dialogue_address, dialogue_payment, dialogue_human, dialogue_two]
