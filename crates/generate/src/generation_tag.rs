//! `{% generation %}` … `{% endgeneration %}`, which transformers adds to Jinja.
//!
//! The blocks mark what the assistant said, for training; rendered, they are their content in a scope
//! of its own. `{% with %}` is the same, so that the tags are written as that before the template is
//! compiled; lines and dashes stay where they are.

use std::borrow::Cow;

/// The template with the tags of another name.
pub(crate) fn replace_generation_tags(source: &str) -> Cow<'_, str> {
    if !source.contains("generation") {
        return source.into();
    }
    let mut written = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let (before, from) = rest.split_at(at);
        written.push_str(before);
        let length = match from.as_bytes().get(1) {
            Some(b'#') => from.find("#}").map_or(from.len(), |end| end + 2),
            Some(b'{') => end_of_code(from, "}}"),
            Some(b'%') => end_of_code(from, "%}"),
            _ => 1,
        };
        let (tag, after) = from.split_at(length);
        rest = after;
        match name(tag) {
            Some("generation") => written.push_str(&tag.replacen("generation", "with", 1)),
            Some("endgeneration") => written.push_str(&tag.replacen("endgeneration", "endwith", 1)),
            Some("raw") => {
                // What follows is no code up to the tag that ends it.
                let end = end_of_raw(rest);
                written.push_str(tag);
                written.push_str(&rest[..end]);
                rest = &rest[end..];
            }
            _ => written.push_str(tag),
        }
    }
    (written + rest).into()
}

/// The name of a tag that is nothing but its name; `None` for all others.
fn name(tag: &str) -> Option<&str> {
    let inner = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    Some(inner.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim())
}

/// Where code that begins here has ended; strings in it may hold its end mark.
fn end_of_code(source: &str, mark: &str) -> usize {
    let mut quote = None;
    let mut escaped = false;
    for (at, c) in source.char_indices().skip(2) {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if matches!(c, '"' | '\'') => quote = Some(c),
            None if source[at..].starts_with(mark) => return at + mark.len(),
            None => {}
        }
    }
    source.len()
}

fn end_of_raw(source: &str) -> usize {
    let ends = source.match_indices("{%").find(|&(at, _)| {
        let end = source[at..].find("%}").map_or(source.len(), |end| at + end + 2);
        name(&source[at..end]) == Some("endraw")
    });
    ends.map_or(source.len(), |(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::replace_generation_tags;

    #[test]
    fn tags_are_replaced_and_nothing_else() {
        for (source, replaced) in [
            ("{% generation %}a{% endgeneration %}", "{% with %}a{% endwith %}"),
            ("{%- generation -%}\n{%-endgeneration-%}", "{%- with -%}\n{%-endwith-%}"),
            ("{%+ generation +%}", "{%+ with +%}"),
            ("{# {% generation %} #}{{ '{% generation %}' }}", ""),
            (
                "{% raw %}{% generation %}{%- endraw %}{% generation %}",
                "{% raw %}{% generation %}{%- endraw %}{% with %}",
            ),
            ("{% set generation = '%}' %}{{ generation }} { generation", ""),
            ("{% if add_generation_prompt %}{{ \"\\\"{% generation %}\" }}", ""),
            ("{% generation", ""),
        ] {
            let expected = if replaced.is_empty() { source } else { replaced };
            assert_eq!(replace_generation_tags(source), expected);
        }
    }
}
