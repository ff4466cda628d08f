//! What is in force, to show.

/// Every setting with its value and where that was written, in the order of the program's help.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effective(pub Vec<Setting>);

/// One setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Its flag, without dashes.
    pub name: String,
    /// Its values as text; none if it is not set.
    pub values: Vec<String>,
    /// `default`, `command line`, `variable NAME`, or the file's path.
    pub from: String,
}

impl Effective {
    /// As a settings file that says the same, the places as comments.
    #[must_use]
    pub fn to_yaml(&self) -> String {
        let quoted = |value: &String| serde_json::Value::from(value.as_str()).to_string();
        let line = |setting: &Setting| {
            let Setting { name, values, from } = setting;
            match &values[..] {
                [] => format!("# {name}: not set\n"),
                [one] => format!("{name}: {} # {from}\n", quoted(one)),
                many => {
                    format!("{name}: [{}] # {from}\n", many.iter().map(quoted).collect::<Vec<_>>().join(", "))
                }
            }
        };
        self.0.iter().map(line).collect()
    }

    /// `{"NAME": {"value": ..., "from": "..."}}`.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let entry = |setting: &Setting| {
            let value = match &setting.values[..] {
                [] => serde_json::Value::Null,
                [one] => one.as_str().into(),
                many => many.to_vec().into(),
            };
            (setting.name.clone(), serde_json::json!({ "value": value, "from": setting.from }))
        };
        self.0.iter().map(entry).collect::<serde_json::Map<_, _>>().into()
    }
}
