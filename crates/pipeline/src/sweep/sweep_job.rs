//! What a sweep is asked for.

use std::path::{Path, PathBuf};

use gptq_checkpoint::Checkpoint;
use gptq_compute::Device;
use gptq_records::branch_report::{TOOL, model_name};
use gptq_records::manifest::MadeFrom;
use gptq_text::calibration::Calibration;

use super::config::{Branch, SweepConfig};
use crate::error::{Error, Result};
use crate::plan::{BranchPlan, Setting, plan_branch};
use crate::rates::KnownRates;
use crate::write::metadata;

/// What a branch's manifest calls the digest of its source.
pub(super) const SOURCE: &str = "the source";

/// Branches to make, and everything that they are made with.
#[derive(Clone, Debug)]
pub struct SweepJob<'a> {
    /// The configuration.
    pub config: &'a SweepConfig,
    /// Its branches that this process makes.
    pub branches: &'a [Branch],
    /// Hub id or folder of the dense model, as it was named.
    pub model: &'a str,
    /// The dense model.
    pub source: &'a Checkpoint,
    /// Of a source whose shards come and go, what they are of: other contents have another name.
    pub origin: Option<&'a str>,
    /// Windows that all branches are calibrated on.
    pub calibration: &'a Calibration,
    /// Where to compute, all of one kind: each makes branches of its own.
    pub devices: &'a [Device],
    /// Branches that a device makes at the same time.
    pub together: usize,
    /// Folder for the branches, one folder each.
    pub out: &'a Path,
    /// Treat a Hessian that needed f64 or more damping as an error.
    pub strict: bool,
    /// What is known of a device, for predictions.
    pub rates: &'a KnownRates,
}

impl SweepJob<'_> {
    /// What a branch costs, its size to the byte; `gpu_memory` is the card's, in bytes.
    ///
    /// # Errors
    /// Settings that the model's shape does not allow.
    pub fn plan(&self, branch: &Branch, gpu_memory: u64) -> Result<BranchPlan> {
        let calibration = Some(self.calibration).filter(|_| branch.spec.recipe.calibrates());
        let (windows, seq_len) = self.calibration.workload();
        plan_branch(
            self.source.config(),
            &branch.spec,
            self.config.source_dtype,
            self.config.layout,
            &metadata(&branch.spec, self.config.source_dtype, calibration),
            Setting {
                windows,
                seq_len,
                shared_grams: self.config.shared_grams(),
                together: self.together,
                gpu_memory,
            },
        )
    }

    /// Branches that are made at the same time, on all devices.
    pub(super) fn at_once(&self) -> usize {
        self.devices.len().max(1) * self.together.max(1)
    }

    /// The first device, of whose kind all are.
    pub(super) fn device(&self) -> &Device {
        self.devices.first().unwrap_or(&Device::Cpu)
    }

    /// Bytes on devices of several kinds differ, and a branch's name does not say where it was made.
    pub(super) fn check_devices(&self) -> Result<()> {
        let kind = self.device().kind();
        match self.devices.iter().find(|device| device.kind() != kind) {
            Some(other) => Err(Error::DeviceKinds { one: kind, other: other.kind() }),
            None => Ok(()),
        }
    }

    pub(super) fn dir(&self, branch: &Branch) -> PathBuf {
        self.out.join(&branch.name)
    }

    /// Everything that the bytes of a branch depend on, the source as far as it is known.
    pub(super) fn made_from(&self, branch: &Branch, source: Option<&str>) -> MadeFrom {
        let spec = &branch.spec;
        let group = gptq_checkpoint::GroupSize(spec.group_size).to_string();
        let mut settings = format!(
            "{} bits, group size {group}, act-order {}, damp {:?}, {}",
            spec.bits,
            spec.act_order,
            spec.damp,
            spec.recipe.name()
        );
        let mut calibration = "none".to_owned();
        if spec.recipe.calibrates() {
            let c = self.calibration;
            settings.push_str(&format!(", {}", spec.choices));
            calibration = format!(
                "{} × {} tokens of {} ({}), seed {}, sha256 {}",
                c.windows.len(),
                c.seq_len,
                c.dataset.portable().name,
                c.dataset.fingerprint,
                c.seed,
                c.sha256
            );
        }
        [
            ("the program", TOOL.to_owned()),
            ("the branch", branch.name.clone()),
            ("the model", model_name(self.model)),
            ("settings", settings),
            ("source dtype", self.config.source_dtype.name().to_owned()),
            ("layout", self.config.layout.name().to_owned()),
            ("calibration", calibration),
            ("the device", self.device().kind()),
        ]
        .into_iter()
        .chain(source.map(|digest| (SOURCE, digest.to_owned())))
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
    }
}
