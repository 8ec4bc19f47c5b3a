"""JSON that satisfies a schema: speculation under the constraint against masking alone.

Six texts of our own, each with a schema of what to extract from it. All contenders write the same
tokens greedily; what differs is how many passes they take.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Row
from pertoken.reproduce._speculation import Make, Unit, accepted, decode, speed_row

NEW_TOKENS = 160
# White space as json.dumps writes it, and free (llguidance's default), where a small model may
# write tabs to the end.
FORMS = {
    "fixed white space": {
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
    },
    "free white space": {"whitespace_flexible": True},
}


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(of: dict[str, Any], most: int) -> dict[str, Any]:
    return {"type": "array", "items": of, "minItems": 1, "maxItems": most}


_NAME = {"type": "string", "maxLength": 40}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 100000}
_PRICE = {"type": "number"}
_DATE = {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"}


def _one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "order": (
        "Hello, this is Maria Keller from Harbour Street 12 in Hamburg. I would like to order "
        "three desk lamps at 24.50 euros each and one oak bookshelf at 149 euros. Please send "
        "everything by express delivery before 2024-11-05, I pay by credit card.",
        _object(
            customer_name=_NAME,
            shipping_address=_object(street=_NAME, city=_NAME),
            ordered_items=_list(_object(product_name=_NAME, quantity=_COUNT, unit_price=_PRICE), 3),
            delivery_method=_one_of("standard", "express", "pickup"),
            payment_method=_one_of("invoice", "credit card", "bank transfer"),
            latest_delivery_date=_DATE,
        ),
    ),
    "incident": (
        "On 2023-07-19 at about 14:30 the pump P-204 in the cooling hall failed because of a worn "
        "bearing. Two workers were on site, nobody was hurt. The line stood still for 95 minutes. "
        "The bearing was replaced and the team will check pumps P-205 and P-206 next week.",
        _object(
            incident_date=_DATE,
            equipment_identifier=_NAME,
            root_cause=_NAME,
            severity_level=_one_of("low", "medium", "high", "critical"),
            number_of_injured_people=_COUNT,
            downtime_minutes=_COUNT,
            follow_up_equipment=_list(_NAME, 3),
            is_resolved={"type": "boolean"},
        ),
    ),
    "recipe": (
        "Grandma's lentil soup feeds four people and takes about 45 minutes. Chop two onions and "
        "three carrots, fry them in olive oil, add 300 grams of red lentils and a litre of "
        "vegetable stock, let it simmer, and finish with lemon juice. It is vegan and easy.",
        _object(
            recipe_title=_NAME,
            number_of_servings=_COUNT,
            preparation_minutes=_COUNT,
            difficulty=_one_of("easy", "intermediate", "advanced"),
            ingredients=_list(_object(ingredient_name=_NAME, amount=_NAME), 4),
            dietary_labels=_list(_one_of("vegan", "vegetarian", "gluten-free"), 2),
        ),
    ),
    "patient": (
        "Mr. Omar Haddad, 57 years old, came in with chest pain and shortness of breath since "
        "yesterday evening. Blood pressure 148 over 92, pulse 96, temperature 37.2. He takes "
        "metformin and ramipril every day and is allergic to penicillin. We admitted him to "
        "cardiology.",
        _object(
            patient_name=_NAME,
            patient_age_years=_COUNT,
            reported_symptoms=_list(_NAME, 3),
            vital_signs=_object(
                systolic_blood_pressure=_COUNT,
                diastolic_blood_pressure=_COUNT,
                heart_rate=_COUNT,
                body_temperature_celsius=_PRICE,
            ),
            current_medications=_list(_NAME, 3),
            known_allergies=_list(_NAME, 2),
            triage_decision=_one_of("discharge", "observation", "admission"),
        ),
    ),
    "flight": (
        "Your booking is confirmed: passenger Lena Novak, flight LH1834 from Munich to Lisbon on "
        "2025-03-14, departure 09:40, arrival 12:05, seat 17C, economy class, one checked bag of "
        "23 kilograms. The total price is 218.90 euros.",
        _object(
            passenger_name=_NAME,
            flight_number=_NAME,
            departure=_object(airport_city=_NAME, departure_date=_DATE, departure_time=_NAME),
            arrival=_object(airport_city=_NAME, arrival_time=_NAME),
            seat_number=_NAME,
            travel_class=_one_of("economy", "premium economy", "business", "first"),
            checked_bags=_list(_object(weight_kilograms=_COUNT), 2),
            total_price=_object(amount=_PRICE, currency=_one_of("EUR", "USD", "GBP")),
        ),
    ),
    "review": (
        "I have used the Nordwind X2 vacuum cleaner for three weeks. Suction is strong, the "
        "battery lasts a good 50 minutes, and it is quiet. What I do not like is the small dust "
        "container and the high price of 329 dollars. Still, four out of five stars, and I would "
        "buy it again.",
        _object(
            product_name=_NAME,
            overall_sentiment=_one_of("positive", "neutral", "negative"),
            star_rating={"type": "integer", "minimum": 1, "maximum": 5},
            positive_aspects=_list(_NAME, 3),
            negative_aspects=_list(_NAME, 3),
            battery_minutes=_COUNT,
            price_in_dollars=_PRICE,
            would_recommend={"type": "boolean"},
        ),
    ),
}


def prompts_of(tokenizer: Any) -> dict[str, list[int]]:
    """Ids of every task's prompt: the instruction, the keys and the text, as a chat."""
    found = {}
    for name, (text, schema) in TASKS.items():
        keys = ", ".join(schema["properties"])
        question = (
            f"Extract the data from the text as one JSON object with the keys {keys}. "
            f"Answer with the JSON only.\n\nText: {text}"
        )
        if getattr(tokenizer, "chat_template", None):
            question = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                tokenize=False,
                add_generation_prompt=True,
            )
            found[name] = tokenizer.encode(question, add_special_tokens=False)
        else:
            found[name] = tokenizer.encode(question)
    return found


def contenders(model: Any, tokenizer: Any, schema: dict[str, Any], form: str) -> dict[str, Make]:
    """Name -> maker of a `generate` set-up, each with a constraint of its own."""
    from pertoken.decode import Constrained, ConstraintMask, Goose, Plain
    from pertoken.decode.grammar import JSONSchemaConstraint

    make = partial(JSONSchemaConstraint, schema | {"x-guidance": FORMS[form]}, tokenizer=tokenizer)
    stops = model.generation_config.eos_token_id
    return {
        "masking": lambda: {"logits_processor": [ConstraintMask(make(), stops)]},
        "forced tokens": lambda: Constrained(Plain(), make()),
        "goose, auto budget": lambda: Constrained(Goose(budget="auto"), make()),
    }


def run_constrained(
    context: Context, form: str, new_tokens: int = NEW_TOKENS
) -> dict[str, dict[str, Unit]]:
    """Units by task and contender; contenders take turns on every task.

    Tasks during which other programs used the machine are left out.
    """
    from pertoken.timing import alternate

    model, tokenizer = context.load()
    prompts = prompts_of(tokenizer)
    names = list(TASKS)[: 1 if context.smoke else None]
    makes = {name: contenders(model, tokenizer, TASKS[name][1], form) for name in names}
    kinds = list(makes[names[0]])
    for kind in kinds:  # warm up, and measure the costs
        decode(model, prompts[names[0]], makes[names[0]][kind], 4)

    def unit(kind: str, number: int) -> Unit:
        return decode(model, prompts[names[number]], makes[names[number]][kind], new_tokens)

    turns = {kind: partial(unit, kind) for kind in kinds}
    run = alternate(turns, len(names), watch=0.0 if context.smoke else 0.5)
    return {
        names[entry.index]: {kind: call.value for kind, call in entry.calls.items()}
        for entry in [*run.kept, *(run.dropped if context.smoke else [])]
    }


def speculation_rows(context: Context) -> list[Row]:
    """All rows; each form of white space is one unit of the run."""
    new_tokens = 12 if context.smoke else NEW_TOKENS
    rows = []
    for form in context.track(list(FORMS), "JSON schemas under speculation"):
        units = context.remember(
            ["speculation", form], partial(run_constrained, context, form, new_tokens)
        )
        rows += constrained_rows(units, form, context.seed)
    return rows


def constrained_rows(units: dict[str, dict[str, Unit]], form: str, seed: int) -> list[Row]:
    """Speed over masking alone, tokens per pass, and the share of identical texts."""
    found = list(units.values())
    masking = [unit["masking"] for unit in found]
    rows = []
    for kind in ("forced tokens", "goose, auto budget"):
        own = [unit[kind] for unit in found]
        metric = f"JSON schema, {form}, {kind}"
        same = [a["ids"] == b["ids"] for a, b in zip(own, masking, strict=True)]
        rows += [
            speed_row(
                f"{metric}: wall clock over masking",
                [unit["seconds"] for unit in own],
                [unit["seconds"] for unit in masking],
                seed,
            ),
            Row(f"{metric}: tokens per pass", accepted(own), unit="tokens", baseline=1.0),
            Row(
                f"{metric}: same tokens as masking",
                sum(same) / len(same) if same else float("nan"),
                unit="share",
            ),
        ]
    tokens = sum(len(unit["ids"]) for unit in masking)
    seconds = sum(unit["seconds"] for unit in masking)
    speed = tokens / seconds if seconds else float("nan")
    return [*rows, Row(f"JSON schema, {form}, masking alone", speed, unit="tokens/s")]
