//! Quantized linears as files in the wild hold them: one opinion for all code that reads, shows or
//! verifies.
//!
//! Programs disagree about the format, and some of what they write contradicts its own settings.
//! Where only one meaning is possible it is read, and counted so that it can be said
//! ([`PackedNotes`]); where the meaning is lost it is refused:
//!
//! - A symmetric grid has one zero, `2^(bits-1)`. So whether a file stores zeros minus one can be
//!   seen in the zeros themselves, whatever the settings call it.
//! - Without act-order column `j` belongs to group `j / group_size`. So `g_idx` can be absent, or
//!   be a placeholder of zeros. With act-order it holds an order that is nowhere else.
//! - Scales may be stored wider than the fp16 that is computed with, here as in other programs, and
//!   `g_idx` as 64-bit integers.

use half::f16;
use safetensors::Dtype;

use crate::gptq::{check_sides, check_values};
use crate::names::{G_IDX, QWEIGHT, QZEROS, SCALES};
use crate::{
    Bits, Checkpoint, CheckpointFormat, DType, Error, GptqLinear, LinearShape, QuantizeConfig,
    Result, TensorRef, pack_rows,
};

/// How the stored zeros of a linear relate to its settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredZeros {
    /// As the settings say; zeros of an asymmetric grid cannot show otherwise.
    AsDeclared,
    /// All are the middle of the grid in the other format: not minus one under `gptq`, or minus one
    /// under `gptq_v2`.
    OtherFormat,
    /// The settings say that the grid is symmetric, but some zero is not its middle.
    OffMiddle,
}

/// How many of a checkpoint's packed linears contradict its settings, and how they were read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PackedNotes {
    /// Packed linears that were looked at.
    pub linears: usize,
    /// Those with [`StoredZeros::OtherFormat`].
    pub other_format: usize,
    /// Those with [`StoredZeros::OffMiddle`].
    pub off_middle: usize,
    /// Those whose `g_idx` holds only zeros although there are groups, and no act-order.
    pub placeholders: usize,
    /// Those whose scales are stored as F32 or BF16.
    pub wide_scales: usize,
    /// Those of them that fp16 does not hold exactly.
    pub rounded_scales: usize,
    /// Those whose `g_idx` is stored as I64.
    pub wide_indices: usize,
}

impl PackedNotes {
    /// A sentence for each kind of contradiction.
    #[must_use]
    pub fn warnings(&self, quantize: &QuantizeConfig) -> Vec<String> {
        let Self {
            linears,
            other_format,
            off_middle,
            placeholders,
            wide_scales,
            rounded_scales,
            wide_indices,
        } = *self;
        let format = quantize.checkpoint_format;
        let how = match format {
            CheckpointFormat::Gptq => "without the minus one",
            CheckpointFormat::GptqV2 => "minus one",
        };
        let mut warnings = Vec::new();
        if other_format > 0 {
            warnings.push(format!(
                "{other_format} of {linears} packed linears store their zeros {how}, although the \
                 settings say `{}`: read as `{}`; other programs may misread them",
                format.name(),
                format.other().name()
            ));
        }
        if off_middle > 0 {
            warnings.push(format!(
                "{off_middle} of {linears} packed linears hold zeros that a symmetric grid does not \
                 have, although the settings say or imply `sym` true: read as they are stored"
            ));
        }
        if placeholders > 0 {
            warnings.push(format!(
                "{placeholders} of {linears} packed linears have a `g_idx` of zeros although there \
                 are groups: read in order, as by the settings there is no act-order"
            ));
        }
        if wide_scales > 0 {
            let exactly = match rounded_scales {
                0 => "exactly".to_owned(),
                count => format!("and those of {count} rounded"),
            };
            warnings.push(format!(
                "{wide_scales} of {linears} packed linears store their `scales` as F32 or BF16: read \
                 as F16, {exactly}; other programs may refuse them"
            ));
        }
        if wide_indices > 0 {
            warnings.push(format!(
                "{wide_indices} of {linears} packed linears store their `g_idx` as I64: read as I32; \
                 other programs may refuse them"
            ));
        }
        warnings
    }
}

impl Checkpoint {
    /// Reads and checks a quantized linear. `prefix` is its full name, such as
    /// `model.layers.0.self_attn.q_proj`. What the module's head says is brought to the usual form:
    /// zeros minus one, a group for every column.
    ///
    /// # Errors
    /// [`Error::NotQuantized`], missing tensors, types and shapes that do not follow from the
    /// configuration, [`Error::GroupIndex`], [`Error::LostOrder`], scales that are not finite, and a
    /// bias as [`Checkpoint::linear_bias`] refuses it.
    pub fn gptq_linear(&self, prefix: &str, shape: &LinearShape) -> Result<GptqLinear> {
        let (grid, format) = self.sound_grid(prefix, shape)?;
        let PackedGrid { bits, in_features, out_features, groups, qzeros, scales, g_idx } = grid;
        let qweight = self.qweight(prefix, shape)?.to_words();
        let mut linear =
            GptqLinear { bits, in_features, out_features, groups, qweight, qzeros, scales, g_idx };
        if format == CheckpointFormat::GptqV2 {
            linear.shift_v2_zeros()?;
        }
        Ok(linear)
    }

    /// Checks a quantized linear without reading its codes, any of which are valid; gives the bytes of
    /// its fields.
    ///
    /// # Errors
    /// As [`Checkpoint::gptq_linear`].
    pub fn check_gptq_linear(&self, prefix: &str, shape: &LinearShape) -> Result<u64> {
        let (grid, _) = self.sound_grid(prefix, shape)?;
        let codes = grid.bits.words(grid.in_features) * grid.out_features;
        let words = codes + grid.qzeros.len() + grid.g_idx.len();
        Ok(4 * words as u64 + 2 * grid.scales.len() as u64)
    }

    /// A linear's grid, checked and with a group for every column, and how its zeros are stored.
    fn sound_grid(
        &self,
        prefix: &str,
        shape: &LinearShape,
    ) -> Result<(PackedGrid, CheckpointFormat)> {
        let quantize = self.settings()?;
        let mut grid = self.packed_grid(prefix, shape)?;
        if grid.has_placeholder_index() {
            grid.g_idx = self.in_order(prefix, shape.in_features, "holds only zeros")?;
        }
        check_values(prefix, grid.groups, &grid.g_idx, &grid.scales)?;
        self.linear_bias(prefix, shape)?;
        let stored = quantize.stored_zeros(&grid.qzeros, shape.out_features)?;
        let format = match stored {
            StoredZeros::OtherFormat => quantize.checkpoint_format.other(),
            _ => quantize.checkpoint_format,
        };
        Ok((grid, format))
    }

    /// Reads a quantized linear but its codes, without looking at values: zeros as they are stored,
    /// group indices and scales as they come. An absent `g_idx` is filled in where the order is known.
    ///
    /// # Errors
    /// As [`Checkpoint::gptq_linear`], without those about values.
    pub fn packed_grid(&self, prefix: &str, shape: &LinearShape) -> Result<PackedGrid> {
        let quantize = self.settings()?;
        let &LinearShape { in_features, out_features, .. } = shape;
        check_sides(prefix, in_features, out_features)?;
        let scales = self.scales(prefix, shape)?;
        self.qweight(prefix, shape)?;
        Ok(PackedGrid {
            bits: quantize.bits,
            in_features,
            out_features,
            groups: quantize.groups(in_features),
            qzeros: self.qzeros(prefix, shape)?,
            scales: f16_scales(&scales)?.0,
            g_idx: self.g_idx(prefix, in_features)?,
        })
    }

    /// How the zeros and the group indices of all packed linears relate to the settings, and in what
    /// types they and the scales are stored. Reads these tensors of each; what cannot be read is left
    /// to the code that needs it.
    #[must_use]
    pub fn packed_notes(&self) -> PackedNotes {
        let mut notes = PackedNotes::default();
        let Some(quantize) = self.quantize_config() else { return notes };
        for (prefix, shape) in self.config().linears().filter(|(p, _)| self.has_gptq_linear(p)) {
            notes.linears += 1;
            let zeros = self.qzeros(&prefix, &shape);
            match zeros.and_then(|zeros| quantize.stored_zeros(&zeros, shape.out_features)) {
                Ok(StoredZeros::OtherFormat) => notes.other_format += 1,
                Ok(StoredZeros::OffMiddle) => notes.off_middle += 1,
                Ok(StoredZeros::AsDeclared) | Err(_) => {}
            }
            let groups = quantize.groups(shape.in_features);
            if !quantize.order_is_stored(shape.in_features) {
                let g_idx = self.g_idx(&prefix, shape.in_features);
                notes.placeholders += usize::from(g_idx.is_ok_and(|g| is_placeholder(&g, groups)));
            }
            if let Ok(scales) = self.scales(&prefix, &shape)
                && scales.dtype != DType::F16
            {
                notes.wide_scales += 1;
                let exact = f16_scales(&scales).is_ok_and(|(_, exact)| exact);
                notes.rounded_scales += usize::from(!exact);
            }
            let index = format!("{prefix}.{G_IDX}");
            notes.wide_indices += usize::from(self.stored_type(&index) == Some(Dtype::I64));
            [QZEROS, G_IDX, SCALES]
                .iter()
                .for_each(|leaf| self.release(&format!("{prefix}.{leaf}")));
        }
        notes
    }

    fn settings(&self) -> Result<&QuantizeConfig> {
        let missing = || Error::NotQuantized { dir: self.dir().to_owned() };
        self.quantize_config().ok_or_else(missing)
    }

    fn qweight(&self, prefix: &str, shape: &LinearShape) -> Result<TensorRef<'_>> {
        let rows = self.settings()?.bits.words(shape.in_features);
        self.exact(&format!("{prefix}.{QWEIGHT}"), DType::I32, &[rows, shape.out_features])
    }

    fn words(&self, name: &str, shape: &[usize]) -> Result<Vec<u32>> {
        Ok(self.exact(name, DType::I32, shape)?.to_words())
    }

    fn qzeros(&self, prefix: &str, shape: &LinearShape) -> Result<Vec<u32>> {
        let quantize = self.settings()?;
        let groups = quantize.groups(shape.in_features);
        let words = quantize.bits.words(shape.out_features);
        self.words(&format!("{prefix}.{QZEROS}"), &[groups, words])
    }

    fn scales(&self, prefix: &str, shape: &LinearShape) -> Result<TensorRef<'_>> {
        let groups = self.settings()?.groups(shape.in_features);
        self.tensor_shaped(&format!("{prefix}.{SCALES}"), &[groups, shape.out_features])
    }

    fn g_idx(&self, prefix: &str, in_features: usize) -> Result<Vec<u32>> {
        let name = format!("{prefix}.{G_IDX}");
        if self.stored_type(&name) == Some(Dtype::I64) {
            let groups = self.settings()?.groups(in_features);
            return self.wide_index(&name, in_features, groups);
        }
        if self.contains(&name) {
            return self.words(&name, &[in_features]);
        }
        if self.weights().promised(&self.config().stored_name(&name)).is_some() {
            return Err(self.missing(&name));
        }
        self.in_order(prefix, in_features, "is missing")
    }

    /// The groups of columns that are in order, unless act-order gave them another one.
    fn in_order(&self, prefix: &str, columns: usize, lost: &'static str) -> Result<Vec<u32>> {
        let quantize = self.settings()?;
        if quantize.order_is_stored(columns) {
            return Err(Error::LostOrder { tensor: format!("{prefix}.{G_IDX}"), lost });
        }
        let size = quantize.group_size.unwrap_or(columns);
        Ok((0..columns).map(|column| (column / size) as u32).collect())
    }
}

/// Scales as they are computed with, and whether each is what is stored.
fn f16_scales(stored: &TensorRef<'_>) -> Result<(Vec<f16>, bool)> {
    let scales = stored.to_f16()?;
    if stored.dtype == DType::F16 {
        return Ok((scales, true));
    }
    let mut exact = true;
    for (index, (&scale, value)) in scales.iter().zip(stored.to_f32()).enumerate() {
        let error = (scale.to_f32() - value).abs();
        // What is not finite is found with all else that is wrong with values.
        if error > value.abs() * HALF_STEP && value.is_finite() {
            let tensor = stored.name.to_owned();
            return Err(Error::F16Underflow { tensor, index, value });
        }
        exact &= error == 0.0;
    }
    Ok((scales, exact))
}

/// Most that rounding to a normal number of fp16 changes, relative to the number.
const HALF_STEP: f32 = 1.0 / 2048.0;

/// A quantized linear without its codes; fields as those of [`GptqLinear`], but as they are stored.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedGrid {
    /// Code width.
    pub bits: Bits,
    /// Input width.
    pub in_features: usize,
    /// Output width.
    pub out_features: usize,
    /// How many groups share `in_features`.
    pub groups: usize,
    /// Packed zeros as they are stored, `[groups, out_features / 32 * bits]`.
    pub qzeros: Vec<u32>,
    /// Scales, `[groups, out_features]`.
    pub scales: Vec<f16>,
    /// The group of each column, `[in_features]`.
    pub g_idx: Vec<u32>,
}

impl PackedGrid {
    /// Whether its group index is a placeholder: only zeros, although there are groups.
    #[must_use]
    pub fn has_placeholder_index(&self) -> bool {
        is_placeholder(&self.g_idx, self.groups)
    }
}

impl QuantizeConfig {
    /// Whether only `g_idx` shows which group a column of such a linear belongs to.
    #[must_use]
    pub fn order_is_stored(&self, in_features: usize) -> bool {
        self.desc_act && self.groups(in_features) > 1
    }

    /// How a linear's packed zeros relate to the settings.
    ///
    /// # Errors
    /// Sides that the format cannot hold.
    pub fn stored_zeros(&self, qzeros: &[u32], out_features: usize) -> Result<StoredZeros> {
        if !self.sym {
            return Ok(StoredZeros::AsDeclared);
        }
        let (bits, format) = (self.bits, self.checkpoint_format);
        let all = |format: CheckpointFormat| -> Result<bool> {
            let zeros = vec![format.stored_middle(bits); out_features];
            let row = pack_rows(bits, &zeros, 1, out_features)?;
            Ok(qzeros.chunks(row.len()).all(|words| words == row))
        };
        Ok(match (all(format)?, all(format.other())?) {
            (true, _) => StoredZeros::AsDeclared,
            (false, true) => StoredZeros::OtherFormat,
            (false, false) => StoredZeros::OffMiddle,
        })
    }
}

/// Whether an index is a placeholder: act-order or not, every group has columns of its own.
fn is_placeholder(g_idx: &[u32], groups: usize) -> bool {
    groups > 1 && g_idx.iter().all(|&group| group == 0)
}
