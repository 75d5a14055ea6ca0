//! The part of JSON Schema that this project's schemas use, read strictly.
//!
//! A validator from elsewhere would bring more crates than the command itself adds; and it would let
//! keys pass which a schema does not list, as JSON Schema asks.

use serde_json::{Map, Value};

/// Words that schemas may use; all others are faults.
const WORDS: [&str; 14] = [
    "$schema",
    "title",
    "description",
    "$defs",
    "$ref",
    "anyOf",
    "type",
    "enum",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "minimum",
    "maximum",
];
/// Of arrays.
const LENGTHS: [&str; 2] = ["minItems", "maxItems"];

pub(crate) struct Schema(Value);

/// What is wrong with a document.
pub(crate) fn refusals(schema: &Value, document: &Value) -> Vec<String> {
    Schema::new(schema.clone()).check(document)
}

impl Schema {
    pub(crate) fn new(schema: Value) -> Self {
        Self(schema)
    }

    pub(crate) fn title(&self) -> String {
        let title = self.0["title"].as_str().unwrap();
        title.split(',').next().unwrap().to_owned()
    }

    /// What is wrong with a document, with the place of each.
    pub(crate) fn check(&self, document: &Value) -> Vec<String> {
        let mut wrong = Vec::new();
        self.walk(&self.0, document, "$", &mut wrong);
        wrong
    }

    /// What is wrong with the schema itself: words that are not read here, and references to nothing.
    pub(crate) fn faults(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        self.proofread(&self.0, "$", &mut wrong);
        wrong
    }

    fn proofread(&self, schema: &Value, at: &str, wrong: &mut Vec<String>) {
        let Some(words) = schema.as_object() else {
            return wrong.push(format!("{at} is no schema"));
        };
        for (word, value) in words {
            let at = format!("{at}.{word}");
            match word.as_str() {
                "properties" | "$defs" => {
                    for (name, inner) in value.as_object().into_iter().flatten() {
                        self.proofread(inner, &format!("{at}.{name}"), wrong);
                    }
                }
                "items" | "additionalProperties" => self.proofread(value, &at, wrong),
                "anyOf" => value
                    .as_array()
                    .into_iter()
                    .flatten()
                    .for_each(|inner| self.proofread(inner, &at, wrong)),
                "$ref" if self.definition(value).is_none() => {
                    wrong.push(format!("{at} leads to nothing"));
                }
                word if WORDS.contains(&word) || LENGTHS.contains(&word) => {}
                _ => wrong.push(format!("{at} is not read")),
            }
        }
    }

    fn definition(&self, reference: &Value) -> Option<&Value> {
        self.0.pointer(reference.as_str()?.strip_prefix('#')?)
    }

    fn walk(&self, schema: &Value, value: &Value, at: &str, wrong: &mut Vec<String>) {
        if let Some(reference) = schema.get("$ref") {
            match self.definition(reference) {
                Some(schema) => self.walk(schema, value, at, wrong),
                None => wrong.push(format!("{at}: {reference} leads to nothing")),
            }
        }
        if let Some(choices) = schema["anyOf"].as_array() {
            let tried = choices.iter().map(|choice| {
                let mut wrong = Vec::new();
                self.walk(choice, value, at, &mut wrong);
                wrong
            });
            // Of several forms the one that is nearest tells most.
            let nearest = tried.min_by_key(Vec::len).unwrap_or_default();
            wrong.extend(nearest);
        }
        if let Some(types) = schema.get("type")
            && !has_type(types, value)
        {
            return wrong.push(format!("{at}: {value} is not of type {types}"));
        }
        if let Some(values) = schema["enum"].as_array()
            && !values.contains(value)
        {
            wrong.push(format!("{at}: {value} is none of {values:?}"));
        }
        match value {
            Value::Number(number) => {
                let number = number.as_f64().unwrap();
                if schema["minimum"].as_f64().is_some_and(|least| number < least)
                    || schema["maximum"].as_f64().is_some_and(|most| number > most)
                {
                    wrong.push(format!("{at}: {number} is out of bounds"));
                }
            }
            Value::Array(items) => self.array(schema, items, at, wrong),
            Value::Object(entries) => self.object(schema, entries, at, wrong),
            _ => {}
        }
    }

    fn array(&self, schema: &Value, items: &[Value], at: &str, wrong: &mut Vec<String>) {
        let length = items.len() as u64;
        if schema["minItems"].as_u64().is_some_and(|least| length < least)
            || schema["maxItems"].as_u64().is_some_and(|most| length > most)
        {
            wrong.push(format!("{at}: has {length} items"));
        }
        if let Some(inner) = schema.get("items") {
            for (i, item) in items.iter().enumerate() {
                self.walk(inner, item, &format!("{at}[{i}]"), wrong);
            }
        }
    }

    fn object(
        &self,
        schema: &Value,
        entries: &Map<String, Value>,
        at: &str,
        wrong: &mut Vec<String>,
    ) {
        // A choice of several forms or a reference describes the keys.
        if schema.get("$ref").is_some() || schema.get("anyOf").is_some() {
            return;
        }
        for name in schema["required"].as_array().into_iter().flatten() {
            if !entries.contains_key(name.as_str().unwrap()) {
                wrong.push(format!("{at}: has no {name}"));
            }
        }
        for (name, value) in entries {
            let at = format!("{at}.{name}");
            match schema["properties"].get(name).or(schema.get("additionalProperties")) {
                Some(inner) => self.walk(inner, value, &at, wrong),
                None => wrong.push(format!("{at} is not described")),
            }
        }
    }
}

fn has_type(types: &Value, value: &Value) -> bool {
    let one = |name: &str| match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    };
    match types {
        Value::String(name) => one(name),
        Value::Array(names) => names.iter().filter_map(Value::as_str).any(one),
        _ => false,
    }
}
