"""German sentences, built by a small grammar in the manner of news: what translation prompts need and English texts lack."""

import random


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Gender of the whole is that of its second part.
FRONT = words("Bundes Landes Stadt Auto Bank Bildungs Gesundheits Umwelt Verkehrs Energie Sport Kultur Handels Jugend Daten")
BACK = {
    "m": words("minister verband markt rat plan bericht vertrag preis skandal gipfel"),
    "f": words("regierung krise behörde firma reform messe steuer konferenz stiftung sammlung"),
    "n": words("amt gesetz projekt unternehmen zentrum ministerium museum abkommen institut forum"),
}
PLAIN = {
    "m": words("Sprecher Richter Trainer Präsident Forscher Bürgermeister Täter Nachbar Zeuge Sieger"),
    "f": words("Polizei Kanzlerin Mannschaft Universität Künstlerin Zeitung Mehrheit Feuerwehr Ärztin Gewerkschaft"),
    "n": words("Gericht Parlament Krankenhaus Orchester Dorf Team Kind Publikum Paar Königshaus"),
}
ADJECTIVES = words("neu alt groß klein umstritten deutsch europäisch jung erfolgreich geheim ehemalig wichtig schwer lang")
ARTICLES = {"m": ("der", "den"), "f": ("die", "die"), "n": ("das", "das")}  # nominative, accusative
VERBS = {  # infinitive: third person now, then
    "kaufen": ("kauft", "kaufte"),
    "prüfen": ("prüft", "prüfte"),
    "kritisieren": ("kritisiert", "kritisierte"),
    "unterstützen": ("unterstützt", "unterstützte"),
    "besuchen": ("besucht", "besuchte"),
    "fordern": ("fordert", "forderte"),
    "verlassen": ("verlässt", "verließ"),
    "verhindern": ("verhindert", "verhinderte"),
    "gewinnen": ("gewinnt", "gewann"),
    "verkaufen": ("verkauft", "verkaufte"),
    "begrüßen": ("begrüßt", "begrüßte"),
    "planen": ("plant", "plante"),
    "finanzieren": ("finanziert", "finanzierte"),
    "veröffentlichen": ("veröffentlicht", "veröffentlichte"),
    "schützen": ("schützt", "schützte"),
    "verlieren": ("verliert", "verlor"),
}
MODALS = ("will", "soll", "kann", "muss", "darf", "wollte", "musste", "konnte")
TIMES = (
    "am Montag",
    "am späten Abend",
    "im vergangenen Jahr",
    "seit Wochen",
    "nach langem Streit",
    "in der Nacht zum Sonntag",
    "zum ersten Mal",
    "kurz vor der Wahl",
    "heute",
    "nach Angaben der Behörden",
    "wegen der hohen Kosten",
    "trotz aller Warnungen",
)
PLACES = words("Berlin München Hamburg Köln Leipzig Wien Zürich Augsburg Dresden Stuttgart Brüssel Paris Bremen Mainz Rostock")
ENDINGS = (
    ", sagte {subject} in {place} .",
    ", wie {subject} mitteilte .",
    ", obwohl {subject} davor gewarnt hatte .",
    ", weil {subject} das so beschlossen hat .",
    ", während {subject} noch zögert .",
    ", und {subject} freut sich darüber .",
    " .",
    " .",
)


def phrase(draw: random.Random, case: int) -> str:
    """A noun with its article, perhaps with an adjective; case: 0 nominative, 1 accusative, both singular."""
    gender = draw.choice("mfn")
    noun = draw.choice(PLAIN[gender])
    if draw.random() < 0.6:
        noun = draw.choice(FRONT) + draw.choice(BACK[gender])
    elif case == 1 and noun in ("Präsident", "Nachbar", "Zeuge"):  # weak nouns
        noun += "n" if noun != "Präsident" else "en"
    if draw.random() < 0.4:
        adjective = draw.choice(ADJECTIVES) + ("en" if gender == "m" and case == 1 else "e")
        return f"{ARTICLES[gender][case]} {adjective} {noun}"
    return f"{ARTICLES[gender][case]} {noun}"


def clause(draw: random.Random) -> str:
    """A main clause, its subject or a time in front."""
    subject, thing, time = phrase(draw, 0), phrase(draw, 1), draw.choice(TIMES)
    where = f" in {draw.choice(PLACES)}" if draw.random() < 0.3 else ""
    infinitive = draw.choice(sorted(VERBS))
    modal = draw.random() < 0.4
    verb = draw.choice(MODALS) if modal else draw.choice(VERBS[infinitive])
    end = f" {infinitive}" if modal else ""
    front, middle = (time, subject) if draw.random() < 0.4 else (subject, time)
    return f"{front} {verb} {middle} {thing}{where}{end}"


def sentence(draw: random.Random) -> str:
    """One sentence, tokenised as translation corpora are: a space before each mark."""
    text = clause(draw)
    if draw.random() < 0.25:
        text += f" , aber {clause(draw)}"
    text += draw.choice(ENDINGS).format(subject=phrase(draw, 0), place=draw.choice(PLACES)).replace(",", " ,", 1)
    return text[0].upper() + text[1:].strip()
