-- The ledger: what each committed transaction did to the watched tables, written by triggers in that transaction, so that
-- what is rolled back is not in it. It lies in a schema of its own, outside of what pipelines usually capture.

CREATE SCHEMA IF NOT EXISTS meander_ledger;

CREATE TABLE IF NOT EXISTS meander_ledger.entries (
    transaction_id bigint NOT NULL,
    -- From 0 within the transaction: the ordinal of the change's coordinate if the publication holds the watched tables
    -- and no other that the transaction changes.
    change_index bigint NOT NULL,
    schema_name text NOT NULL,
    table_name text NOT NULL,
    -- INSERT, UPDATE, DELETE, TRUNCATE.
    operation text NOT NULL CHECK (operation IN ('I', 'U', 'D', 'T')),
    -- The row's key after the change (before it, for D); NULL for T and for tables without a key.
    key text,
    -- The key before the change, if the change was to the key.
    old_key text,
    -- Digest of the row after the change; NULL for D and T.
    digest text,
    PRIMARY KEY (transaction_id, change_index)
);

CREATE OR REPLACE FUNCTION meander_ledger.append(
    schema_name text, table_name text, operation text, key text, old_key text, digest text
) RETURNS void LANGUAGE sql AS $$
    INSERT INTO meander_ledger.entries
    SELECT
        id,
        -- Counted anew each time, so that a rollback to a savepoint takes the numbers back, too.
        coalesce((SELECT max(e.change_index) + 1 FROM meander_ledger.entries e WHERE e.transaction_id = id), 0),
        schema_name, table_name, operation, key, old_key, digest
    FROM (SELECT pg_current_xact_id()::text::bigint) AS transaction (id)
$$;

-- The settings are those of capture: they decide how values look as text.
CREATE OR REPLACE FUNCTION meander_ledger.note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET TimeZone = 'UTC'
    SET DateStyle = 'ISO'
    SET IntervalStyle = 'postgres'
    SET extra_float_digits = 3
    SET bytea_output = 'hex'
AS $$
DECLARE
    new_key text;
    old_key text;
BEGIN
    CASE TG_OP
    WHEN 'INSERT' THEN
        PERFORM meander_ledger.append(
            TG_TABLE_SCHEMA, TG_TABLE_NAME, 'I', meander_ledger.key_of(NEW), NULL, meander_ledger.digest_of(NEW));
    WHEN 'UPDATE' THEN
        new_key := meander_ledger.key_of(NEW);
        old_key := meander_ledger.key_of(OLD);
        PERFORM meander_ledger.append(
            TG_TABLE_SCHEMA, TG_TABLE_NAME, 'U', new_key, nullif(old_key, new_key), meander_ledger.digest_of(NEW));
    WHEN 'DELETE' THEN
        PERFORM meander_ledger.append(TG_TABLE_SCHEMA, TG_TABLE_NAME, 'D', meander_ledger.key_of(OLD), NULL, NULL);
    WHEN 'TRUNCATE' THEN
        PERFORM meander_ledger.append(TG_TABLE_SCHEMA, TG_TABLE_NAME, 'T', NULL, NULL, NULL);
    END CASE;
    RETURN NULL;
END
$$;

-- Watches a table, or learns of its new columns if it is watched already.
--
-- It makes two functions of the table's row type. key_of gives the columns of the replica identity as a JSON object of their
-- text forms. digest_of gives the MD5 of `name=value` (just `name` for NULL) of each column, joined by the character U+001F.
CREATE OR REPLACE FUNCTION meander_ledger.watch(watched regclass) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    key_expression text;
    digest_expression text;
BEGIN
    SELECT
        string_agg(format('%L || to_json(concat(($1).%I))', to_json(a.attname::text) || ':', a.attname),
            ' || '','' || ' ORDER BY a.attnum) FILTER (WHERE a.attnum = ANY (i.indkey)),
        string_agg(format('CASE WHEN ($1).%I IS NULL THEN %L ELSE concat(%L, ($1).%I) END',
            a.attname, a.attname, a.attname || '=', a.attname), ', ' ORDER BY a.attnum)
    INTO key_expression, digest_expression
    FROM pg_class c
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_index i ON i.indrelid = c.oid
        AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END
    WHERE c.oid = watched;

    EXECUTE format('CREATE OR REPLACE FUNCTION meander_ledger.key_of(%s) RETURNS text LANGUAGE sql STABLE AS %L',
        watched, 'SELECT ' || coalesce('''{'' || ' || key_expression || ' || ''}''', 'NULL::text'));
    EXECUTE format('CREATE OR REPLACE FUNCTION meander_ledger.digest_of(%s) RETURNS text LANGUAGE sql STABLE AS %L',
        watched, format('SELECT md5(array_to_string(ARRAY[%s], chr(31)))', digest_expression));
    EXECUTE format('CREATE OR REPLACE TRIGGER meander_ledger_rows AFTER INSERT OR UPDATE OR DELETE ON %s '
        'FOR EACH ROW EXECUTE FUNCTION meander_ledger.note()', watched);
    EXECUTE format('CREATE OR REPLACE TRIGGER meander_ledger_truncate AFTER TRUNCATE ON %s '
        'FOR EACH STATEMENT EXECUTE FUNCTION meander_ledger.note()', watched);
END
$$;
