use std::fs;

use gptq_records::branch_report::TaskRecord;

use super::*;
use crate::samples::{branch, report};

fn before() -> Report {
    report([
        branch("4bit-32g", 4, Some(32), 19.0, 0.0100),
        branch("3bit-128g", 3, Some(128), 20.0, 0.0800),
    ])
}

fn baseline() -> Baseline {
    Baseline::accept(&before(), None, true).unwrap()
}

/// The verdicts that are not `Ok`, as `branch what verdict`.
fn verdicts(outcome: &Outcome) -> Vec<String> {
    let unusual = outcome.findings.iter().filter(|f| f.verdict != Verdict::Ok);
    unusual.map(|f| format!("{} {} {}", f.branch, f.what, f.verdict.name())).collect()
}

fn after(change: impl FnOnce(&mut BranchReport)) -> Outcome {
    let mut now = before();
    change(&mut now.branches[0]);
    baseline().check(&now, true).unwrap()
}

#[test]
fn the_accepted_report_passes() {
    let outcome = baseline().check(&before(), true).unwrap();
    assert!(outcome.passed);
    assert_eq!(verdicts(&outcome), [""; 0]);
    // fp16, and perplexity, KL and bytes of two branches.
    assert_eq!(outcome.findings.len(), 7);
    assert_eq!(outcome.findings[0].branch, "fp16");
}

#[test]
fn values_beyond_their_tolerance_fail_and_those_within_do_not() {
    let perplexity = |value: f64| after(|b| b.evaluations[0].perplexity = value);
    assert!(perplexity(19.09).passed, "0.47 %");
    let worse = perplexity(19.1);
    assert_eq!(
        (worse.passed, verdicts(&worse)),
        (false, vec!["4bit-32g perplexity WORSE".to_owned()])
    );
    let kl = |value: f64| after(|b| b.evaluations[0].kl = Some(value));
    assert!(kl(0.010_49).passed);
    let worse = kl(0.010_51);
    assert_eq!((worse.passed, verdicts(&worse)), (false, vec!["4bit-32g kl WORSE".to_owned()]));
    let finding = worse.findings.iter().find(|f| f.verdict == Verdict::Worse).unwrap();
    assert_eq!((finding.baseline, finding.now), (Some(0.01), Some(0.010_51)));
    assert!((finding.allowed.unwrap() - 0.010_5).abs() < 1e-12);
    for nonsense in [f64::NAN, f64::INFINITY, -1.0] {
        let outcome = kl(nonsense);
        assert_eq!(
            (outcome.passed, verdicts(&outcome)),
            (false, vec!["4bit-32g kl IMPOSSIBLE".to_owned()])
        );
        assert!(!perplexity(nonsense).passed);
    }
    // Equal models are off zero by rounding.
    assert!(kl(-1e-9).passed);
}

#[test]
fn what_is_better_passes_and_is_reported() {
    let outcome = after(|b| {
        b.evaluations[0].perplexity = 18.8;
        b.evaluations[0].kl = Some(0.009);
    });
    assert!(outcome.passed);
    assert_eq!(verdicts(&outcome), ["4bit-32g perplexity improved", "4bit-32g kl improved"]);
}

#[test]
fn bytes_must_be_equal() {
    let outcome = after(|b| b.file_bytes -= 1);
    assert_eq!(
        (outcome.passed, verdicts(&outcome)),
        (false, vec!["4bit-32g file_bytes CHANGED".to_owned()])
    );
}

#[test]
fn the_model_itself_may_move_in_neither_direction() {
    for base in [18.5, 19.0] {
        let outcome = after(|b| b.evaluations[0].base_perplexity = Some(base));
        assert_eq!(
            (outcome.passed, verdicts(&outcome)),
            (false, vec!["fp16 perplexity CHANGED".to_owned()])
        );
    }
}

#[test]
fn branches_may_be_added_but_not_lost() {
    let mut now = before();
    now.branches[0].branch = "other".to_owned();
    let outcome = baseline().check(&now, true).unwrap();
    assert_eq!(verdicts(&outcome), ["4bit-32g branch MISSING", "other branch new"]);
    assert!(!outcome.passed);
    // A report of one branch is about that one only.
    now.branches.remove(0);
    let outcome = baseline().check(&now, false).unwrap();
    assert_eq!((outcome.passed, outcome.findings.len()), (true, 4));
    assert!(!baseline().check(&now, true).unwrap().passed);
}

#[test]
fn a_kl_that_is_no_longer_measured_is_missing() {
    let outcome = after(|b| b.evaluations[0].kl = None);
    assert_eq!(
        (outcome.passed, verdicts(&outcome)),
        (false, vec!["4bit-32g kl MISSING".to_owned()])
    );
}

#[test]
fn what_was_measured_otherwise_is_an_error_with_the_reason() {
    let refused = |change: fn(&mut BranchReport)| {
        let mut now = before();
        change(&mut now.branches[1]);
        baseline().check(&now, true).unwrap_err().to_string()
    };
    for (change, reason) in [
        (
            (|b| b.evaluations[0].dataset.fingerprint.push('0')) as fn(&mut BranchReport),
            "the text of heldout.txt has changed",
        ),
        (|b| b.evaluations[0].windows = 8, "the number of windows was 40, now 8"),
        (
            |b| b.evaluations[0].protocol = "strided".to_owned(),
            "the protocol was paper, now strided",
        ),
        (|b| b.model = "other".to_owned(), "the model was org/model, now other"),
        (|b| b.evaluations.clear(), "it was not measured"),
    ] {
        let error = refused(change);
        assert!(error.contains("`3bit-128g`") && error.contains(reason), "{error}");
    }
    // Of several evaluations, the one that the baseline names counts.
    let mut now = before();
    let mut other = now.branches[0].evaluations[0].clone();
    other.protocol = "strided".to_owned();
    other.perplexity = 99.0;
    now.branches[0].evaluations.insert(0, other);
    assert!(baseline().check(&now, true).unwrap().passed);
}

#[test]
fn an_update_keeps_tolerances_and_only_a_whole_one_drops_branches() {
    let mut old = baseline();
    let own = Tolerance { perplexity: 0.02, kl: 0.2, ..Tolerance::DEFAULT };
    old.branches.get_mut("3bit-128g").unwrap().tolerance = Some(own);
    old.tolerance.kl = 0.03;
    let mut now = before();
    now.branches.retain(|b| b.branch == "3bit-128g");
    now.branches[0].evaluations[0].perplexity = 23.0;
    let whole = Baseline::accept(&now, Some(&old), true).unwrap();
    assert_eq!(whole.branches.keys().collect::<Vec<_>>(), ["3bit-128g"]);
    let accepted = &whole.branches["3bit-128g"];
    assert_eq!((accepted.perplexity, accepted.tolerance), (Some(23.0), Some(own)));
    assert_eq!(whole.tolerance.kl, 0.03);
    assert!(whole.check(&now, true).unwrap().passed);
    let one = Baseline::accept(&now, Some(&old), false).unwrap();
    assert_eq!(one.branches.keys().collect::<Vec<_>>(), ["3bit-128g", "4bit-32g"]);
    assert_eq!(one.branches["4bit-32g"], old.branches["4bit-32g"]);

    // Other text: a whole report starts anew, one branch would stand beside values of the old text.
    now.branches[0].evaluations[0].windows = 8;
    let anew = Baseline::accept(&now, Some(&old), true).unwrap();
    assert_eq!(anew.measurement.unwrap().windows, 8);
    let error = Baseline::accept(&now, Some(&old), false).unwrap_err().to_string();
    assert!(error.contains("number of windows"), "{error}");
    now.branches[0].evaluations.clear();
    assert!(matches!(Baseline::accept(&now, None, true), Err(Error::NotMeasured)));
}

#[test]
fn a_baseline_is_written_and_read_and_mistakes_in_it_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("baseline.json");
    let refused = || Baseline::read(&path).unwrap_err().to_string();
    let missing = Baseline::read(&path).unwrap_err();
    assert!(missing.hint().unwrap().contains("--update"), "{missing}");
    let mut written = baseline();
    written.write(&path).unwrap();
    assert_eq!(Baseline::read(&path).unwrap(), written);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"kl\": 0.05", "\"kl\": 5")).unwrap();
    assert!(refused().contains("tolerance of kl for `all` is 5"), "{}", refused());
    fs::write(&path, text.replace("\"perplexity\": 0.005", "\"perplexty\": 0.005")).unwrap();
    assert!(refused().contains("perplexty"), "{}", refused());
    written.format = 2;
    written.write(&path).unwrap();
    assert!(refused().contains("format is 2"), "{}", refused());
}

fn task(name: &str, value: f64, higher_is_better: bool) -> TaskRecord {
    TaskRecord {
        task: name.to_owned(),
        metric: "acc".to_owned(),
        value,
        standard_error: Some(0.02),
        higher_is_better,
        samples: Some(400),
        few_shot: Some(0),
        harness: "lm_eval 0.4".to_owned(),
        dtype: "f32".to_owned(),
        base: None,
    }
}

#[test]
fn results_of_other_questions_are_not_compared() {
    let mut accepted = before();
    accepted.branches[0].set_task(task("facts", 0.70, true));
    let baseline = Baseline::accept(&accepted, None, true).unwrap();
    let detail = |change: &dyn Fn(&mut TaskRecord)| {
        let mut now = accepted.clone();
        change(&mut now.branches[0].tasks[0]);
        let outcome = baseline.check(&now, true).unwrap();
        assert!(!outcome.passed);
        assert_eq!(verdicts(&outcome), ["4bit-32g facts acc CHANGED"]);
        let changed = outcome.findings.into_iter().find(|f| f.verdict == Verdict::Changed);
        changed.unwrap().detail.unwrap()
    };
    assert_eq!(
        detail(&|t| (t.few_shot, t.value) = (Some(5), 0.8)),
        "the number of solved questions before each was 0, now 5"
    );
    assert_eq!(detail(&|t| t.samples = Some(100)), "the number of questions was 400, now 100");
    assert_eq!(detail(&|t| t.samples = None), "the number of questions was 400, now unknown");
    assert_eq!(
        detail(&|t| t.harness = "lm_eval 0.5".to_owned()),
        "the harness was lm_eval 0.4, now lm_eval 0.5"
    );
    // A baseline of a version that had the number alone is held to that.
    let mut old = serde_json::to_value(&baseline).unwrap();
    let tasks = &mut old["branches"]["4bit-32g"]["tasks"];
    assert_eq!(tasks["facts acc"]["samples"], 400);
    tasks["facts acc"] = serde_json::json!(0.70);
    let old: Baseline = serde_json::from_value(old).unwrap();
    let mut now = accepted.clone();
    now.branches[0].tasks[0].few_shot = Some(5);
    assert!(old.check(&now, true).unwrap().passed);
    now.branches[0].tasks[0].value = 0.5;
    assert_eq!(verdicts(&old.check(&now, true).unwrap()), ["4bit-32g facts acc WORSE"]);
}

/// What was only asked, and never measured on a text, is held as well.
#[test]
fn a_baseline_may_hold_tasks_alone() {
    let mut accepted = before();
    accepted.branches.iter_mut().for_each(|branch| branch.evaluations.clear());
    assert!(matches!(Baseline::accept(&accepted, None, true), Err(Error::NotMeasured)));
    accepted.branches[0].set_task(task("facts", 0.70, true));
    accepted.branches.truncate(1);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("baseline.json");
    Baseline::accept(&accepted, None, true).unwrap().write(&path).unwrap();
    let baseline = Baseline::read(&path).unwrap();
    let outcome = |change: &dyn Fn(&mut BranchReport)| {
        let mut now = accepted.clone();
        change(&mut now.branches[0]);
        baseline.check(&now, true).map(|outcome| verdicts(&outcome)).map_err(|e| e.to_string())
    };
    assert_eq!(outcome(&|_| ()).unwrap(), [""; 0]);
    assert_eq!(
        outcome(&|b| b.set_task(task("facts", 0.6, true))).unwrap(),
        ["4bit-32g facts acc WORSE"]
    );
    assert_eq!(outcome(&|b| b.tasks.clear()).unwrap(), ["4bit-32g facts acc MISSING"]);
    assert_eq!(outcome(&|b| b.file_bytes += 1).unwrap(), ["4bit-32g file_bytes CHANGED"]);
    let other = outcome(&|b| b.model = "org/other".to_owned()).unwrap_err();
    assert!(other.contains("the model was org/model, now org/other"), "{other}");
    // A perplexity that was measured since passes, and an update of all holds it from then on.
    let measured = |b: &mut BranchReport| b.evaluations = before().branches[0].evaluations.clone();
    assert_eq!(outcome(&measured).unwrap(), ["4bit-32g perplexity new"]);
    let mut now = accepted.clone();
    measured(&mut now.branches[0]);
    assert!(Baseline::accept(&now, Some(&baseline), true).unwrap().measurement.is_some());
    let one = Baseline::accept(&now, Some(&baseline), false).unwrap_err().to_string();
    assert!(one.contains("results on tasks alone"), "{one}");
    let kept = Baseline::accept(&accepted, Some(&baseline), false).unwrap();
    assert_eq!(kept, baseline);
    // The other way round numbers are missed that the baseline has.
    let unmeasured = self::baseline().check(&accepted, true).unwrap_err().to_string();
    assert!(unmeasured.contains("it was not measured"), "{unmeasured}");
}

/// Perplexities are not given up for tasks, nor are results on tasks for perplexities.
#[test]
fn an_update_loses_nothing_unseen() {
    let mut tasks_alone = before();
    for branch in &mut tasks_alone.branches {
        branch.evaluations.clear();
        branch.set_task(task("facts", 0.70, true));
    }
    for whole in [true, false] {
        let refused = Baseline::accept(&tasks_alone, Some(&baseline()), whole).unwrap_err();
        assert!(refused.to_string().contains("not measured on a text"), "{refused}");
    }
    // Among others that were measured, it is named.
    let mut mixed = before();
    mixed.branches[1] = tasks_alone.branches[1].clone();
    for old in [None, Some(&baseline())] {
        let refused = Baseline::accept(&mixed, old, true).unwrap_err().to_string();
        assert!(refused.contains("`3bit-128g`") && refused.contains("not measured"), "{refused}");
    }
    mixed.branches[1].tasks.clear();
    assert_eq!(Baseline::accept(&mixed, None, true).unwrap().branches.len(), 1);
}

#[test]
fn tasks_alone_say_of_which_model_they_are() {
    let mut report = before();
    report.branches.iter_mut().for_each(|branch| branch.evaluations.clear());
    report.branches[0].set_task(task("facts", 0.70, true));
    let alone = Baseline::accept(&report, None, true).unwrap();
    assert_eq!(alone.check_values(), Ok(()));
    let refused = |change: &dyn Fn(&mut Baseline)| {
        let mut changed = alone.clone();
        change(&mut changed);
        changed.check_values().unwrap_err()
    };
    assert!(refused(&|b| b.model = None).contains("neither a measurement nor a model"));
    assert!(refused(&|b| b.base_perplexity = Some(19.0)).contains("base_perplexity"));
    let branch = |b: &mut Baseline| b.branches.get_mut("4bit-32g").unwrap().kl = Some(0.1);
    assert!(refused(&branch).contains("has a kl"));
    let both = Baseline { model: Some("org/model".to_owned()), ..baseline() };
    assert!(both.check_values().unwrap_err().contains("both a measurement and a model"));
}

#[test]
fn results_on_tasks_are_held_in_their_own_unit() {
    let mut accepted = before();
    accepted.branches[0].set_task(task("facts", 0.70, true));
    accepted.branches[0].set_task(task("bytes", 1.50, false));
    let baseline = Baseline::accept(&accepted, None, true).unwrap();
    // What is written is read, and a baseline without tasks stays as it was.
    let text = serde_json::to_string(&baseline).unwrap();
    assert_eq!(serde_json::from_str::<Baseline>(&text).unwrap(), baseline);
    assert!(!serde_json::to_string(&self::baseline()).unwrap().contains("task"));

    let outcome = |change: &dyn Fn(&mut BranchReport)| {
        let mut now = accepted.clone();
        change(&mut now.branches[0]);
        verdicts(&baseline.check(&now, true).unwrap())
    };
    assert_eq!(outcome(&|_| ()), [""; 0]);
    assert_eq!(outcome(&|b| b.set_task(task("facts", 0.691, true))), [""; 0]);
    assert_eq!(outcome(&|b| b.set_task(task("facts", 0.689, true))), ["4bit-32g facts acc WORSE"]);
    assert_eq!(
        outcome(&|b| b.set_task(task("facts", 0.72, true))),
        ["4bit-32g facts acc improved"]
    );
    assert_eq!(outcome(&|b| b.set_task(task("bytes", 1.52, false))), ["4bit-32g bytes acc WORSE"]);
    assert_eq!(
        outcome(&|b| b.set_task(task("facts", f64::NAN, true))),
        ["4bit-32g facts acc IMPOSSIBLE"]
    );
    assert_eq!(outcome(&|b| b.tasks.truncate(1)), ["4bit-32g facts acc MISSING"]);
    assert_eq!(outcome(&|b| b.set_task(task("other", 0.5, true))), ["4bit-32g other acc new"]);
}
