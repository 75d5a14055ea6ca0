//! The pickle of a state dict, read without executing anything.
//!
//! A pickle is a program for a stack machine that can call any Python function. What `torch.save`
//! writes for a state dict needs some thirty opcodes and a handful of globals. Those are understood
//! here as data (a call of `_rebuild_tensor_v2` is a tensor's claim on a storage), and anything else
//! is an error that names it. Values live in flat vectors and refer to each other by index, so
//! neither depth nor sharing costs a hostile pickle's reader more than a multiple of its length.

use std::collections::{HashMap, HashSet};

use safetensors::Dtype;

use crate::pickle_names::{Global, opcode_name, size};

/// Some 30,000 tensors in one file: more is an attack or damage, not a model.
const MAX_PICKLE: usize = 8 << 20;
/// Dimensions of a tensor; weights have two.
const MAX_DIMENSIONS: usize = 8;

/// A storage as the pickle refers to it.
#[derive(Debug, Clone, Copy)]
struct StorageClaim<'a> {
    key: &'a str,
    /// `None`: bytes, whose type each tensor gives.
    dtype: Option<Dtype>,
    /// In units of the type.
    elements: usize,
}

/// A tensor as the pickle describes it; offset and strides count values.
#[derive(Debug, Clone)]
pub(crate) struct TensorClaim<'a> {
    /// Key of its storage, the archive's entry `data/KEY`.
    pub(crate) storage: &'a str,
    /// Bytes that the storage should have.
    pub(crate) storage_bytes: usize,
    pub(crate) dtype: Dtype,
    pub(crate) offset: usize,
    pub(crate) shape: Vec<usize>,
    pub(crate) strides: Vec<usize>,
}

/// The tensors of a pickled state dict by name, in its order, or what is wrong with it.
pub(crate) fn state_dict(pickle: &[u8]) -> Result<Vec<(&str, TensorClaim<'_>)>, String> {
    if pickle.len() > MAX_PICKLE {
        return Err(format!("it has {} bytes, more than the {MAX_PICKLE} allowed", pickle.len()));
    }
    let mut machine = Machine { input: pickle, ..Machine::default() };
    let result = loop {
        match machine.step() {
            Ok(None) => {}
            Ok(Some(result)) => break result,
            Err(reason) => {
                let at = pickle.len() - machine.input.len();
                return Err(format!("{reason} (before byte {at})"));
            }
        }
    };
    let Value::Dict(dict) = result else {
        return Err("it holds no dictionary of tensors".to_owned());
    };
    let mut names = HashSet::new();
    let mut tensors = Vec::new();
    for &(key, value) in &machine.dicts[dict] {
        let Value::Str(name) = key else {
            return Err("a key of its dictionary is no name".to_owned());
        };
        let Value::Tensor(tensor) = value else {
            return Err(format!("`{name}` is no tensor, so it is no model's state dict"));
        };
        if !names.insert(name) {
            return Err(format!("tensor `{name}` appears twice"));
        }
        tensors.push((name, machine.tensors[tensor].clone()));
    }
    Ok(tensors)
}

/// A value on the stack. Containers are indices into the machine's vectors.
#[derive(Debug, Clone, Copy)]
enum Value<'a> {
    None,
    Bool,
    Int(i64),
    Str(&'a str),
    Global(Global),
    Tuple(usize),
    /// Nothing that is needed lies in lists.
    List,
    Dict(usize),
    Storage(usize),
    Tensor(usize),
}

#[derive(Default)]
struct Machine<'a> {
    /// What is still to be read.
    input: &'a [u8],
    stack: Vec<Value<'a>>,
    /// Heights of the stack where a MARK was set.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    tuples: Vec<Vec<Value<'a>>>,
    dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    storages: Vec<StorageClaim<'a>>,
    tensors: Vec<TensorClaim<'a>>,
}

impl<'a> Machine<'a> {
    /// Executes one opcode; gives the result at STOP.
    fn step(&mut self) -> Result<Option<Value<'a>>, String> {
        let opcode = self.byte()?;
        match opcode {
            b'.' => return self.pop().map(Some),
            b'(' => self.marks.push(self.stack.len()),
            b'q' | b'r' | b'h' | b'j' => self.memo(opcode)?,
            b')' | 0x85..=0x87 | b't' => self.tuple(opcode)?,
            b']' | b'a' | b'e' => self.list(opcode)?,
            b'}' | b's' | b'u' | b'b' => self.dict(opcode)?,
            b'Q' => self.persistent()?,
            b'R' => self.reduce()?,
            0x80 => match self.byte()? {
                2 => {}
                other => return Err(format!("it is of protocol {other}, torch.save writes 2")),
            },
            _ => {
                let value = self.scalar(opcode)?;
                self.stack.push(value);
            }
        }
        Ok(None)
    }

    /// A value that is written out.
    fn scalar(&mut self, opcode: u8) -> Result<Value<'a>, String> {
        Ok(match opcode {
            b'N' => Value::None,
            0x88 | 0x89 => Value::Bool,
            b'K' => Value::Int(self.byte()?.into()),
            b'M' => Value::Int(u16::from_le_bytes(self.array()?).into()),
            b'J' => Value::Int(i32::from_le_bytes(self.array()?).into()),
            0x8a => Value::Int(self.long()?),
            b'X' => {
                let len = u32::from_le_bytes(self.array()?) as usize;
                let text = std::str::from_utf8(self.bytes(len)?);
                Value::Str(text.map_err(|_| "a string is not UTF-8".to_owned())?)
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                let global = Global::find(module, name).ok_or_else(|| {
                    let (module, name) = (module.escape_debug(), name.escape_debug());
                    format!(
                        "it refers to `{module}.{name}`, which no file of weights needs; unless \
                         you trust its author, do not load it with Python either"
                    )
                })?;
                Value::Global(global)
            }
            _ => {
                let name = opcode_name(opcode).unwrap_or("unknown");
                return Err(format!("it uses opcode {opcode:#04x} ({name}), which is not allowed"));
            }
        })
    }

    fn memo(&mut self, opcode: u8) -> Result<(), String> {
        let index = match opcode {
            b'q' | b'h' => self.byte()?.into(),
            _ => u32::from_le_bytes(self.array()?),
        };
        if matches!(opcode, b'q' | b'r') {
            let value = self.pop()?;
            self.stack.push(value);
            self.memo.insert(index, value);
        } else {
            let value = self.memo.get(&index);
            let value = value.ok_or_else(|| format!("its memo has no value {index}"))?;
            self.stack.push(*value);
        }
        Ok(())
    }

    fn tuple(&mut self, opcode: u8) -> Result<(), String> {
        let items = match opcode {
            b')' => Vec::new(),
            b't' => self.since_mark()?,
            _ => {
                let mut items = Vec::new();
                for _ in 0..=opcode - 0x85 {
                    items.insert(0, self.pop()?);
                }
                items
            }
        };
        self.stack.push(Value::Tuple(self.tuples.len()));
        self.tuples.push(items);
        Ok(())
    }

    /// Nothing that is needed lies in a list, so items are dropped.
    fn list(&mut self, opcode: u8) -> Result<(), String> {
        match opcode {
            b']' => {
                self.stack.push(Value::List);
                return Ok(());
            }
            b'a' => drop(self.pop()?),
            _ => drop(self.since_mark()?),
        }
        match self.stack.last() {
            Some(Value::List) => Ok(()),
            _ => Err("it appends to what is no list".to_owned()),
        }
    }

    fn dict(&mut self, opcode: u8) -> Result<(), String> {
        let items = match opcode {
            b'}' => {
                self.new_dict();
                return Ok(());
            }
            // Attributes, such as the versions of modules: a dictionary, and not needed.
            b'b' => match self.pop()? {
                Value::Dict(_) => Vec::new(),
                _ => return Err("it sets attributes from what is no dictionary".to_owned()),
            },
            b's' => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
            _ => self.since_mark()?,
        };
        let (pairs, rest) = items.as_chunks::<2>();
        match self.stack.last() {
            Some(&Value::Dict(dict)) if rest.is_empty() => {
                self.dicts[dict].extend(pairs.iter().map(|&[key, value]| (key, value)));
                Ok(())
            }
            _ => Err("it sets items of what is no dictionary".to_owned()),
        }
    }

    fn new_dict(&mut self) {
        self.stack.push(Value::Dict(self.dicts.len()));
        self.dicts.push(Vec::new());
    }

    /// `('storage', TYPE, KEY, DEVICE, ELEMENTS)`.
    fn persistent(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let claim = match self.items(id) {
            &[
                Value::Str("storage"),
                Value::Global(Global::Storage(dtype)),
                Value::Str(key),
                Value::Str(_),
                Value::Int(elements),
            ] => {
                usize::try_from(elements).ok().map(|elements| StorageClaim { key, dtype, elements })
            }
            _ => None,
        };
        let claim = claim.ok_or("it refers to a storage in an unknown way")?;
        self.stack.push(Value::Storage(self.storages.len()));
        self.storages.push(claim);
        Ok(())
    }

    /// A call, of the few functions that are known.
    fn reduce(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Value::Global(function) = function else {
            return Err("it calls what is no global".to_owned());
        };
        let arguments = match arguments {
            Value::Tuple(tuple) => self.tuples[tuple].clone(),
            _ => return Err("it calls a function with what are no arguments".to_owned()),
        };
        match (function, arguments.as_slice()) {
            (Global::OrderedDict, []) => self.new_dict(),
            // A parameter is its tensor, for every reader.
            (
                Global::RebuildParameter,
                &[tensor @ Value::Tensor(_), Value::Bool, Value::Dict(_)],
            ) => {
                self.stack.push(tensor);
            }
            (Global::RebuildTensor { typed }, arguments) => {
                let claim = self.tensor(typed, arguments).ok_or(
                    "it rebuilds a tensor from impossible arguments, or larger than memory",
                )?;
                self.stack.push(Value::Tensor(self.tensors.len()));
                self.tensors.push(claim);
            }
            _ => return Err(format!("it calls {function:?} with other arguments than PyTorch")),
        }
        Ok(())
    }

    /// `(STORAGE, OFFSET, SHAPE, STRIDES, REQUIRES_GRAD, HOOKS, [TYPE,] [METADATA])`.
    fn tensor(&self, typed: bool, arguments: &[Value<'a>]) -> Option<TensorClaim<'a>> {
        let (
            &[
                Value::Storage(storage),
                Value::Int(offset),
                shape,
                strides,
                Value::Bool,
                Value::Dict(_),
            ],
            rest,
        ) = arguments.split_first_chunk::<6>()?
        else {
            return None;
        };
        let storage = self.storages[storage];
        let (dtype, rest) = match (typed, storage.dtype, rest) {
            (false, Some(dtype), rest) => (dtype, rest),
            (true, _, &[Value::Global(Global::Dtype(dtype)), ref rest @ ..]) => (dtype, rest),
            _ => return None,
        };
        if !matches!(rest, [] | [Value::None | Value::Dict(_)]) {
            return None;
        }
        let unit = storage.dtype.map_or(1, size);
        let claim = TensorClaim {
            storage: storage.key,
            storage_bytes: storage.elements.checked_mul(unit)?,
            dtype,
            offset: usize::try_from(offset).ok()?,
            shape: self.sizes(shape)?,
            strides: self.sizes(strides)?,
        };
        (claim.shape.len() == claim.strides.len()).then_some(claim)
    }

    /// A tuple of sizes.
    fn sizes(&self, tuple: Value<'a>) -> Option<Vec<usize>> {
        let items = match tuple {
            Value::Tuple(tuple) if self.tuples[tuple].len() <= MAX_DIMENSIONS => {
                &self.tuples[tuple]
            }
            _ => return None,
        };
        let size = |item: &Value<'_>| match item {
            Value::Int(size) => usize::try_from(*size).ok(),
            _ => None,
        };
        items.iter().map(size).collect()
    }

    /// A tuple's items; none for any other value.
    fn items(&self, value: Value<'a>) -> &[Value<'a>] {
        match value {
            Value::Tuple(tuple) => &self.tuples[tuple],
            _ => &[],
        }
    }

    /// The topmost value above the last MARK.
    fn pop(&mut self) -> Result<Value<'a>, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let value = if self.stack.len() > floor { self.stack.pop() } else { None };
        value.ok_or_else(|| "its stack is empty where a value is needed".to_owned())
    }

    /// All values above the last MARK, which goes too.
    fn since_mark(&mut self) -> Result<Vec<Value<'a>>, String> {
        let mark = self.marks.pop().ok_or("it lacks a MARK")?;
        Ok(self.stack.split_off(mark))
    }

    fn bytes(&mut self, len: usize) -> Result<&'a [u8], String> {
        let (bytes, rest) = self.input.split_at_checked(len).ok_or("it is truncated")?;
        self.input = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (bytes, rest) = self.input.split_first_chunk().ok_or("it is truncated")?;
        self.input = rest;
        Ok(*bytes)
    }

    fn byte(&mut self) -> Result<u8, String> {
        self.array().map(|[byte]| byte)
    }

    /// Text up to the end of the line.
    fn line(&mut self) -> Result<&'a str, String> {
        let end = self.input.iter().position(|&b| b == b'\n').ok_or("it is truncated")?;
        let line = self.bytes(end)?;
        self.byte()?;
        std::str::from_utf8(line).map_err(|_| "a global's name is not UTF-8".to_owned())
    }

    /// A little-endian integer in two's complement, of up to eight bytes.
    fn long(&mut self) -> Result<i64, String> {
        let len = self.byte()?.into();
        let bytes = self.bytes(len)?;
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut wide = [if negative { 0xFF } else { 0 }; 8];
        let low = wide.get_mut(..len).ok_or("an integer is too large")?;
        low.copy_from_slice(bytes);
        Ok(i64::from_le_bytes(wide))
    }
}
