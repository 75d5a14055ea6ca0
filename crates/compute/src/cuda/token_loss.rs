//! The language-model head in chunks of tokens, so that logits of all tokens are never held.

use cudarc::driver::PushKernelArg;

use super::block_parts;
use super::elementwise::{block_per_row, to_f16};
use super::error::StageContext;
use super::gemm::logits;
use super::matrix::{Matrix, ensure_same_card};
use crate::error::Result;

/// Bytes of logits held at a time: 2,048 tokens of 32,768 words, enough to fill a card.
const LOGITS: usize = 256 << 20;

/// −log p(target) a row; waits for all queued work.
pub(crate) fn token_nll(
    hidden: &Matrix,
    head: &Matrix,
    targets: &[u32],
    softcap: Option<f32>,
) -> Result<Vec<f32>> {
    const OP: &str = "token_nll";
    let (hidden, head) = (to_f16(hidden)?, to_f16(head)?);
    let (cuda, rows) = (hidden.cuda(), hidden.rows());
    let targets = cuda.copied(OP, targets)?;
    let mut out = cuda.uninit::<f32>(OP, rows)?;
    let vocab = head.rows() as i32;
    let function = cuda.kernel("nll.cu", "nll")?;
    for chunk in chunks(rows, head.rows()) {
        let logits = capped_logits((&hidden, &head), chunk.clone(), softcap)?;
        let targets = targets.slice().slice(chunk.clone());
        let mut losses = out.make_mut()?.slice_mut(chunk.clone());
        let mut launch = cuda.stream().launch_builder(&function);
        launch.arg(logits.f32(OP)?).arg(&targets).arg(&mut losses).arg(&vocab);
        // SAFETY: the arguments are the kernel's; logits, targets and losses have a row for each
        // block, and the caller has checked the targets against the vocabulary.
        unsafe { launch.launch(block_per_row(chunk.len())) }.stage(OP)?;
    }
    cuda.read(OP, out.slice(), rows)
}

/// KL(p‖q) a row; waits for all queued work.
pub(crate) fn token_kl(
    p: (&Matrix, &Matrix),
    q: (&Matrix, &Matrix),
    softcap: Option<f32>,
) -> Result<Vec<f32>> {
    const OP: &str = "token_kl";
    ensure_same_card(OP, &[p.0, p.1, q.0, q.1])?;
    let (p_hidden, p_head) = (to_f16(p.0)?, to_f16(p.1)?);
    let (q_hidden, q_head) = (to_f16(q.0)?, to_f16(q.1)?);
    let (cuda, rows) = (p_hidden.cuda(), p_hidden.rows());
    let mut out = cuda.uninit::<f32>(OP, rows)?;
    let vocab = p_head.rows() as i32;
    let function = cuda.kernel("nll.cu", "kl")?;
    for chunk in chunks(rows, p_head.rows()) {
        let p_logits = capped_logits((&p_hidden, &p_head), chunk.clone(), softcap)?;
        let q_logits = capped_logits((&q_hidden, &q_head), chunk.clone(), softcap)?;
        let mut values = out.make_mut()?.slice_mut(chunk.clone());
        let mut launch = cuda.stream().launch_builder(&function);
        launch.arg(p_logits.f32(OP)?).arg(q_logits.f32(OP)?).arg(&mut values).arg(&vocab);
        // SAFETY: the arguments are the kernel's; all three have a row for each block.
        unsafe { launch.launch(block_per_row(chunk.len())) }.stage(OP)?;
    }
    cuda.read(OP, out.slice(), rows)
}

/// Logits of some rows of hidden states under a head.
pub(super) fn capped_logits(
    (hidden, head): (&Matrix, &Matrix),
    rows: std::ops::Range<usize>,
    softcap: Option<f32>,
) -> Result<Matrix> {
    let mut logits = logits(hidden, head, rows)?;
    if let Some(cap) = softcap {
        block_parts::softcap(&mut logits, cap)?;
    }
    Ok(logits)
}

/// Ranges of rows whose logits fit in [`LOGITS`].
pub(super) fn chunks(rows: usize, vocab: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let size = (LOGITS / (vocab.max(1) * size_of::<f32>())).max(1);
    (0..rows).step_by(size).map(move |start| start..(start + size).min(rows))
}
