"""What TypeScript declarations say of a name, without what is said for machines."""

from benchmarks.fetch.interfaces import Entry, described

SOURCE = """
/**
 * A parser of the format [JSON](https://example.org).
 */
interface JSON {
    /**
     * [MDN Reference](https://example.org)
     *
     * The `parse()` static method of the JSON interface converts a {@link String} into
     * an object.
     *
     * ```js
     * JSON.parse("1")
     * ```
     * @param text What is read.
     */
    parse(text: string): any;
    undescribed(): void;
    /** @deprecated */
    old(): void;
}
declare module "node:fs" {
    /** Closes the file. */
    export function closeSync(fd: number): void;
}
/** Runs later. */
declare function setTimeout(): void;
"""


def test_descriptions_come_with_names_and_without_markup() -> None:
    assert list(described(SOURCE)) == [
        Entry("", "JSON", "A parser of the format JSON."),
        Entry("JSON", "parse", "converts a String into an object."),
        Entry("fs", "closeSync", "Closes the file."),
        Entry("", "setTimeout", "Runs later."),
    ]
