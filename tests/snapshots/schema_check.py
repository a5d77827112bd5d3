"""The few words of JSON Schema that the schema of reports is written in."""


def problems(schema, value, whole, place="report"):
    """Returns what in a value is not as its schema says; it may lack nothing either."""
    if "$ref" in schema:
        return problems(whole["$defs"][schema["$ref"][8:]], value, whole, place)
    if "anyOf" in schema:
        found = [problems(s, value, whole, place) for s in schema["anyOf"]]
        return min(found, key=len)
    if "const" in schema or "enum" in schema:
        allowed = schema.get("enum", [schema.get("const")])
        return [] if value in allowed else [f"{place}: {value!r} not in {allowed}"]
    kinds = {"object": dict, "array": list, "string": str, "null": type(None)}
    kinds |= {"integer": int, "number": (int, float)}
    if not isinstance(value, kinds[schema["type"]]):
        return [f"{place}: {value!r} is no {schema['type']}"]
    found = []
    if schema["type"] == "object":
        missing = set(schema["required"]) - value.keys()
        found += [f"{place} lacks {name}" for name in sorted(missing)]
        unknown = value.keys() - schema["properties"].keys()
        found += [f"{place} has {name}" for name in sorted(unknown)]
        for name in value.keys() & schema["properties"].keys():
            described = schema["properties"][name]
            found += problems(described, value[name], whole, f"{place}.{name}")
    if schema["type"] == "array":
        first = schema.get("prefixItems", [])
        if first and len(first) != len(value):
            found.append(f"{place} has {len(value)} items")
        for i, item in enumerate(value):
            described = first[i] if i < len(first) else schema["items"]
            found += problems(described, item, whole, f"{place}[{i}]")
    return found
