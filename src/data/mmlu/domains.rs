//! Which subject is of which domain: lm-evaluation-harness's grouping, which is that of the paper's Table 4 (with anatomy
//! in STEM, where MMLU's authors have it among the others).

/// A group of subjects.
#[derive(Debug)]
pub struct Domain {
    /// As items and files name it.
    pub id: &'static str,
    /// As people do.
    pub name: &'static str,
    /// MMLU's subjects in it.
    pub subjects: &'static [&'static str],
}

/// All of MMLU. The paper's edges have the first three.
pub static DOMAINS: [Domain; 4] = [
    Domain {
        id: "hum",
        name: "Humanities",
        subjects: &[
            "formal_logic",
            "high_school_european_history",
            "high_school_us_history",
            "high_school_world_history",
            "international_law",
            "jurisprudence",
            "logical_fallacies",
            "moral_disputes",
            "moral_scenarios",
            "philosophy",
            "prehistory",
            "professional_law",
            "world_religions",
        ],
    },
    Domain {
        id: "sc",
        name: "Social Sciences",
        subjects: &[
            "econometrics",
            "high_school_geography",
            "high_school_government_and_politics",
            "high_school_macroeconomics",
            "high_school_microeconomics",
            "high_school_psychology",
            "human_sexuality",
            "professional_psychology",
            "public_relations",
            "security_studies",
            "sociology",
            "us_foreign_policy",
        ],
    },
    Domain {
        id: "stem",
        name: "STEM",
        subjects: &[
            "abstract_algebra",
            "anatomy",
            "astronomy",
            "college_biology",
            "college_chemistry",
            "college_computer_science",
            "college_mathematics",
            "college_physics",
            "computer_security",
            "conceptual_physics",
            "electrical_engineering",
            "elementary_mathematics",
            "high_school_biology",
            "high_school_chemistry",
            "high_school_computer_science",
            "high_school_mathematics",
            "high_school_physics",
            "high_school_statistics",
            "machine_learning",
        ],
    },
    Domain {
        id: "other",
        name: "Other",
        subjects: &[
            "business_ethics",
            "clinical_knowledge",
            "college_medicine",
            "global_facts",
            "human_aging",
            "management",
            "marketing",
            "medical_genetics",
            "miscellaneous",
            "nutrition",
            "professional_accounting",
            "professional_medicine",
            "virology",
        ],
    },
];

/// The domain of one of MMLU's subjects.
pub fn of(subject: &str) -> Option<&'static Domain> {
    DOMAINS.iter().find(|d| d.subjects.contains(&subject))
}

/// The domain's name for people; of one that is not MMLU's, its id.
pub fn name(id: &str) -> &str {
    DOMAINS.iter().find(|d| d.id == id).map_or(id, |d| d.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fixture;

    #[test]
    fn every_subject_is_in_one_domain() {
        let mut all: Vec<&str> = DOMAINS.iter().flat_map(|d| d.subjects).copied().collect();
        assert_eq!(all.len(), 57);
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 57);
        assert_eq!(
            (of("anatomy").map(|d| d.id), name("sc"), name("mine")),
            (Some("stem"), "Social Sciences", "mine")
        );
        assert!(of("cooking").is_none());
    }

    #[test]
    fn the_paper_s_table() {
        let Some(dir) = fixture::shared("mmlu") else { return };
        let table = std::fs::read_to_string(dir.join("counts.tsv")).unwrap();
        for line in table.lines().skip(1) {
            let [subject, domain, ..] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
            assert_eq!(of(subject).map(|d| d.name), Some(domain), "{subject}");
        }
    }
}
