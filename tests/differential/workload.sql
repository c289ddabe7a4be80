-- What both captures see. A line of dashes and the word "then" waits until both have published everything so far:
-- each asks the catalog for the shape of a table when it meets it.

INSERT INTO numbers VALUES
  (1, 1, 123456, 1234567890123, 3.3, 4.44, 4000000000, true, 10.1111, 10.11, 1.1, 12345678901234567890123456789012345678, 0.00123, 12345, '$1,234.11'),
  (2, -32768, -2147483648, -9223372036854775808, '-Infinity', '-Infinity', 0, false, -0.000001, -9999999999, -1234567.891, -1, -0.00999, -9999900, '-92233720368547758.08'),
  (3, 32767, 2147483647, 9223372036854775807, 'Infinity', 'Infinity', 4294967295, true, 1e20, 0, 0, 0, 0, 0, '92233720368547758.07'),
  (4, 0, 0, 0, 'NaN', 'NaN', 1, false, 0, 128, 0.128, 255, 0.001, 100, '0'),
  (5, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
  (6, 1, 1, 1, 1e-45, 5e-324, 1, true, 123456789012345678901234567890.123456789012345678901234567890, 1, 1, 1, 0, 0, '-1.50'),
  (7, 1, 1, 1, 3.4028235e38, 1.7976931348623157e308, 1, true, -128, -128, -0.001, -128, 0, 0, '-0.01'),
  (8, 1, 1, 1, '-0', '-0', 1, true, 0.10, 1, 1, 1, 0, 0, 1),
  (9, 1, 1, 1, 1e10, 1e10, 1, true, 100, 1, 1, 1, 0, 0, 1),
  (10, 1, 1, 1, 123456.7, 123456789.123, 1, true, 1000000, 1, 1, 1, 0, 0, 1),
  (11, 1, 1, 1, 0.001, 0.001, 1, true, 0.0001, 1, 1, 1, 0, 0, 1),
  (12, 1, 1, 1, 0.0001, 0.0001, 1, true, 1e-20, 1, 1, 1, 0, 0, 1),
  (13, 1, 1, 1, 16777216, 9007199254740993, 1, true, 32768, 1, 1, 1, 0, 0, 1),
  (14, 1, 1, 1, 9999999, 9999999, 1, true, 32767, 1, 1, 1, 0, 0, 1),
  (15, 1, 1, 1, 2e-3, 2e23, 1, true, -32769, 1, 1, 1, 0, 0, 1);
INSERT INTO numbers (id, n) VALUES (20, 'NaN'), (21, 'Infinity'), (22, '-Infinity'), (23, repeat('9', 300)::numeric), (24, ('0.' || repeat('7', 300))::numeric);
INSERT INTO numbers (id, n10_3) VALUES (30, 'NaN');
UPDATE numbers SET i = 2 WHERE id = 1;
DELETE FROM numbers WHERE id = 1;

INSERT INTO texts VALUES
  (1, 'plain', 'žš', 'abc', 'c', 'cdef', 'q', 'a_name', 'Hello World', '<a b="1">&lt;text&gt;</a>', '76019d1a-ad2e-4b22-96e9-1a6d6543c818',
   '{"b" : 1,  "a": [1, 2.50, null, "ü"]}', '{"b" : 1,  "a": [1, 2.50, null, "ü"]}', 'Top.Collections.Pictures', '"key_#1" => "val 1","key 2" => " ##123 78", n => NULL, "q\"uote" => "b\\s"', '\x000102ff', 'a fat cat', 'very happy', 'b''c', '978-0-393-04002-9'),
  (2, E'quotes \' " \\ / \b \f \n \r \t \u0001 \u007f \u207F \u2028 \U0001F600 end', '', '', '', '', '', '', '', '', '00000000-0000-0000-0000-000000000000', 'null', '"text"', '', '', '', '', 'sad', 'a', NULL),
  (3, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL);
INSERT INTO texts (id, h) VALUES (4, 'a=>1'), (5, 'zz=>1, b=>2, ccc=>3, "ä"=>"ü", "aa"=>"x"');
INSERT INTO bits VALUES (1, B'0', B'11', B'000000001', repeat('1', 64)::bit(64), B'1', B'1', B'101'), (2, B'1', B'00', B'100000000', B'1'::bit(64), B'', B'0', B''), (3, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
  (4, B'1', B'10', B'101010101', B'0'::bit(64), B'111011010001000110000001000000001', B'', B'00000000000000000001');
INSERT INTO times VALUES
  (1, '2016-11-04', '13:51:30', '13:51:30', '13:51:30.123', '13:51:30.1234', '13:51:30.123789+02', '13:51:30.12-03:30', '2016-11-04 13:51:30', '2016-11-04 13:51:30', '2016-11-04 13:51:30.123', '2016-11-04 13:51:30.1234', '2016-11-04 13:51:30.123456+02:00', '2016-11-04 13:51:30+02:00', '2016-11-04 13:51:30.12+00', 'P1Y2M3DT4H5M6.78S', '1 day 1.5 s'),
  (2, '1936-10-25', '00:00:00', '23:59:59', '23:59:59.999', '23:59:59.9999', '00:00:00+00', '23:59:59.99+15', '1936-10-25 22:10:12.608', '1969-12-31 23:59:59', '1969-12-31 23:59:59.999', '1969-12-31 23:59:59.9999', '1936-10-25 22:10:12.608+00', '0001-01-01 00:00:00+00', '9999-12-31 23:59:59.999+00', '-1 year -2 mons +3 days -04:05:06.78', '-0.001 s'),
  (3, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
  (4, '0001-01-01', '12:00:00.000001', '00:00', '00:00:00.001', '00:00:00.0001', '12:00:00.1+00', '12:00+00', '0001-01-01 00:00:00', '1970-01-01', '1970-01-01', '1970-01-01', '2016-11-04 13:51:30+00', '2016-11-04 13:51:00+00', '2016-11-04 13:51:30.1+00', '0', '178000000 years'),
  (5, '9999-12-31', '23:59:59.999999', '00:00', '00:00', '00:00', '00:00:00.000001+01', '00:00+00', '9999-12-31 23:59:59.999999', '9999-12-31', '9999-12-31', '9999-12-31', '9999-12-31 23:59:59.999999+00', '1969-12-31 00:00+00', '1969-12-31 00:00+00', '1 mon', '2 days');
INSERT INTO times (id, iv) VALUES (10, '1 month 1 microsecond'), (11, '10 years'), (12, '-1 mon -1 day'), (13, '100 hours 0.1 s'), (14, '7 mons'), (15, '1 year 1.123457 s'), (16, '0.000001 s');
INSERT INTO times (id, tstz) VALUES (20, '2016-11-04 13:51:30.1+00'), (21, '2016-11-04 13:51:30.120+00'), (22, '2016-11-04 13:51:00+00'), (23, '2016-11-04 13:51:30.000001+00');
INSERT INTO networks VALUES (1, '192.168.2.0/12', '192.168.100.128/25', '08:00:2b:01:02:03', '08:00:2b:01:02:03:04:05'), (2, '::1', '2001:db8::/32', '08002b-010203', '08002b0102030405'), (3, NULL, NULL, NULL, NULL), (4, '10.1.2.3', '10/8', NULL, '08:00:2b:01:02:03');
INSERT INTO ranges VALUES (1, '[1,10]', '(1,9223372036854775806]', '[1.50,2.5]', '[2020-01-01,2020-02-01]', '[2020-01-01 00:00,2020-02-01 12:34:56.5)', '[2020-01-01 00:00+02,infinity)'), (2, 'empty', '(,)', '(,1)', '[,2020-01-01]', '(,infinity]', '[2020-01-01 00:00+00,]'), (3, NULL, NULL, NULL, NULL, NULL, NULL);
INSERT INTO shapes VALUES (1, '(1,-2.5)', '(0,0),(1,1)', '[(0,0),(0,1)]', '[(0,0),(0,1),(0,2)]', '((0,0),(0,1),(1,0),(0,0))', '<(10,4),10>', '{-1,0,0.5}'), (2, '(1e20,NaN)', '(1,1),(1,1)', '[(1,1),(1,1)]', '((0,0),(0,1),(1,0))', '((0,0),(0,1),(1,0))', '<(0,0),0>', '{1,1,0}'), (3, NULL, NULL, NULL, NULL, NULL, NULL, NULL);
INSERT INTO arrays VALUES
  (1, '{1,NULL,-3}', '{1,2,NULL}', '{9223372036854775807}', '{a,NULL,"NULL","with \"quotes\"","back\\slash","a,b","{x}",""}', '{ab,c}', '{a,bb}', '{1,2.50,NULL,1e10}', '{1,2.5,NULL}', '{1.5,NaN,Infinity,NULL}',
   '{1.5,-Infinity,NaN}', '{t,f,NULL}', '{2020-01-01,NULL}', '{12:34:56.123456}', '{12:34:56.123}', '{12:34:56+02,NULL}', '{2020-01-01 12:34:56.123456,NULL}', '{2020-01-01 12:34:56.123}', '{2020-01-01 12:34:56.1+02}', '{76019d1a-ad2e-4b22-96e9-1a6d6543c818,NULL}', ARRAY['{"a": 1}', NULL]::json[], ARRAY['{"a":"x,y"}']::jsonb[],
   ARRAY['\x0001'::bytea, NULL], '{1,4000000000}', '{192.168.2.0/12}', '{10.0.0.0/8}', '{08:00:2b:01:02:03}', ARRAY['[1,2)'::int4range, NULL], ARRAY['[2020-01-01 00:00,2020-02-01 00:00)'::tsrange], ARRAY['[2020-01-01 00:00+00,)'::tstzrange], '{sad,"very happy",NULL}', '{Hello,NULL}', '{a.b,c}', ARRAY['a=>1, b=>NULL'::hstore, NULL]),
  (2, '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}');
INSERT INTO arrays (id) VALUES (3);
INSERT INTO domains VALUES (1, 2, 3.5, 'label', 'ok', '2020-01-01 00:00:00.123'), (2, NULL, NULL, NULL, NULL, NULL);
UPDATE domains SET id = 3 WHERE id = 2;
INSERT INTO unknown VALUES (1, '(1,a)', '[1,2)', 'fat <-> cat', '16/B374D848', '123', '$.a', '{[1,2)}', '{1}', '{<a/>}', '{1 day}', '{101}', '{1}', '{n}', '{"(1,2)"}', '{1}', 'kept');
INSERT INTO required VALUES (1, 1, 1, 1, 1, 1, 1, true, 1.5, 1.5, 1, 't', 'v', 'c', 'ci', '<a/>', '76019d1a-ad2e-4b22-96e9-1a6d6543c818', '{}', '{}', 'a.b', 'a=>1', '\x01', 'a', 'sad', B'1', B'1'::bit(9), B'1',
  '2020-01-01', '12:00', '12:00', '12:00+00', '2020-01-01', '2020-01-01', '2020-01-01+00', '1 s', '10.0.0.1', '10.0.0.0/8', '08:00:2b:01:02:03', '[1,2)', '(1,2)', '(0,0),(1,1)', '[(0,0),(0,1)]', '[(0,0),(0,1)]', '((0,0),(0,1),(1,0))', '<(0,0),1>', '{1,1,0}', '{1}', '{t}', '{ok}');
UPDATE required SET i = 2;
UPDATE required SET id = 2;
DELETE FROM required;
INSERT INTO defaults DEFAULT VALUES;
INSERT INTO defaults (si, n, t, u, dt, e, ia, b1) VALUES (NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL);
DELETE FROM defaults WHERE id = 1;

INSERT INTO extremes (id, d, ts, ts3, tstz, tstz3) VALUES
  (1, 'infinity', 'infinity', 'infinity', 'infinity', 'infinity'), (2, '-infinity', '-infinity', '-infinity', '-infinity', '-infinity'),
  (3, '4713-01-01 BC', '4713-12-31 23:59:59.999999 BC', '4713-12-31 23:59:59.999 BC', '4714-12-31 23:59:59.999999 BC', '0044-03-15 12:00 BC'),
  (4, '0001-12-31 BC', '0001-12-31 BC', '1500-02-28 12:00:00.5', '1500-02-28 12:00:00 BC', '1582-10-04 00:00+00'),
  (5, '5874897-12-31', '294246-12-31 23:59:59.999999', '21016-11-04', '294276-12-31 23:59:59.999999+00', '21016-11-04 13:51:30.1+00');
INSERT INTO extremes (id, ts) VALUES (6, '294276-12-31 23:59:59.999999');
INSERT INTO extremes (id, t, tz, t3) VALUES (10, '24:00:00', '24:00:00+00', '24:00:00'), (11, '24:00', '24:00+02', '24:00'), (12, NULL, '24:00-03', NULL), (13, NULL, '12:00:00+15:59:59', NULL);
INSERT INTO extremes (id, da, tsa, tza, tma) VALUES (20, '{infinity,-infinity,2020-01-01}', '{infinity,-infinity}', '{infinity,-infinity,2020-01-01 00:00+00}', '{24:00,12:34:56.999999,NULL}'), (21, '{0044-03-15 BC}', '{0044-03-15 BC}', '{0044-03-15 BC}', NULL);
INSERT INTO extremes (id, f8, i2) VALUES (30, '{1e300,-0,0.1,1e-10}', '[0:1]={7,8}'), (31, NULL, '{{1,2},{3,4}}');
INSERT INTO extremes (id, e2, bo) VALUES (32, '{{ok,sad},{ok,ok}}', '{{t,f},{f,t}}');
INSERT INTO extremes (id, tv, isa) VALUES (33, '{a,"b c"}', '{978-0-393-04002-9}'), (34, '{a,NULL}', '{978-0-393-04002-9,NULL}');
INSERT INTO extremes (id, bxa, lna, cca, lsa, poa) VALUES (35, '{(0,0),(1,1);(1,1),(2,2)}', '{"{1,2,3}"}', '{"<(0,0),1>"}', '{"[(0,0),(1,1)]"}', '{"((0,0),(0,1),(1,0))"}');

INSERT INTO composite VALUES ('x', 1, '2020-01-01', 1), ('y', 2, '2020-01-02', 2);
UPDATE composite SET v = 3 WHERE a = 1;
UPDATE composite SET a = 5, v = 4 WHERE a = 2;
DELETE FROM composite;
INSERT INTO whole_row VALUES (1, 'a', 1), (2, NULL, 2);
UPDATE whole_row SET v = 'b' WHERE id = 1;
UPDATE whole_row SET v = v;
UPDATE whole_row SET id = 3 WHERE id = 1;
DELETE FROM whole_row;
INSERT INTO whole_row_without_key VALUES ('a', 1);
UPDATE whole_row_without_key SET v = 'b';
DELETE FROM whole_row_without_key;
INSERT INTO whole_row_unique VALUES ('a', 1, 1);
UPDATE whole_row_unique SET z = 2;
UPDATE whole_row_unique SET n = 3;
DELETE FROM whole_row_unique;
INSERT INTO by_index VALUES (1, 'a', 1);
UPDATE by_index SET z = 2;
UPDATE by_index SET v = 'b';
DELETE FROM by_index;
INSERT INTO text_key VALUES ('', 1), ('"quoted" \ é', 2);
UPDATE text_key SET id = 'new' WHERE v = 2;
DELETE FROM text_key;
INSERT INTO typed_key VALUES ('2020-01-01 00:00+00', 1.50, '76019d1a-ad2e-4b22-96e9-1a6d6543c818', 1);
UPDATE typed_key SET n = 2.5;
DELETE FROM typed_key;
INSERT INTO log VALUES ('a', 1), (NULL, NULL);

INSERT INTO toasted SELECT 1, 1, l, l, l::bytea, to_json(l), to_jsonb(l), ('<a>' || l || '</a>')::xml, ARRAY[l], (SELECT array_agg(i) FROM generate_series(1, 3000) i), (SELECT array_agg(i::bigint) FROM generate_series(1, 3000) i),
  (SELECT array_agg('76019d1a-ad2e-4b22-96e9-1a6d6543c818'::uuid) FROM generate_series(1, 300)), hstore('k', l), repeat('1234567890', 1000)::numeric, l, (SELECT string_agg('w' || i, ' ')::tsvector FROM generate_series(1, 1000) i), (SELECT array_agg('2020-01-01'::date) FROM generate_series(1, 2000)), ARRAY[to_json(l)], ARRAY[l::varchar], (SELECT array_agg(i::float8) FROM generate_series(1, 1000) i), (SELECT array_agg('2020-01-01'::timestamp) FROM generate_series(1, 1000)) FROM repeat('long text ', 400) l;
UPDATE toasted SET n = 2;
UPDATE toasted SET id = 2;
DELETE FROM toasted;
INSERT INTO toasted_whole VALUES (1, 1, repeat('long text ', 400));
UPDATE toasted_whole SET n = 2;
DELETE FROM toasted_whole;
INSERT INTO toasted_key SELECT string_agg(md5(i::text), '') , 1 FROM generate_series(1, 75) i;
UPDATE toasted_key SET n = 2;
DELETE FROM toasted_key;

INSERT INTO "Höhe & Tiefe"."a ""quoted"" name" VALUES (1, 'é', 's', 2, 3, 4, 5);
UPDATE "Höhe & Tiefe"."a ""quoted"" name" SET "ID" = 2;
DELETE FROM "Höhe & Tiefe"."a ""quoted"" name";
INSERT INTO "UPPER-case" VALUES (1, 'v');

BEGIN;
INSERT INTO whole_row VALUES (10, 'a', 1);
INSERT INTO composite VALUES ('z', 1, NULL, 1);
SAVEPOINT one; INSERT INTO whole_row VALUES (11, 'b', 1); ROLLBACK TO one;
SAVEPOINT two; UPDATE whole_row SET v = 'c' WHERE id = 10; RELEASE two;
UPDATE whole_row SET id = 12 WHERE id = 10;
DELETE FROM composite;
INSERT INTO whole_row VALUES (10, 'again', 1);
COMMIT;
BEGIN; INSERT INTO whole_row VALUES (99, 'never', 1); ROLLBACK;
TRUNCATE whole_row;
SELECT pg_logical_emit_message(true, 'app', 'alone in its transaction');
BEGIN; SELECT pg_logical_emit_message(true, 'app', '\x00ff'::bytea); INSERT INTO text_key VALUES ('between messages', 1); SELECT pg_logical_emit_message(true, 'app "2"', ''); COMMIT;
SELECT pg_logical_emit_message(false, 'app', 'outside of transactions');

SELECT pg_replication_origin_create('upstream "1"');
SELECT pg_replication_origin_session_setup('upstream "1"');
BEGIN; SELECT pg_replication_origin_xact_setup('1/16B3748', '2020-01-01'); INSERT INTO text_key VALUES ('from upstream', 1); COMMIT;
SELECT pg_replication_origin_xact_reset();
INSERT INTO text_key VALUES ('of an unknown place', 1);
SELECT pg_replication_origin_session_reset();
SELECT pg_logical_emit_message(false, 'app', 'after a transaction from upstream');
INSERT INTO text_key VALUES ('made here', 1);

INSERT INTO changing VALUES (1, 1, 'a');
----- then
ALTER TABLE changing ADD COLUMN c numeric(6, 2) DEFAULT 1.5, ADD COLUMN d mood NOT NULL DEFAULT 'ok';
UPDATE changing SET a = 2;
INSERT INTO changing VALUES (2, 2, 'b', 2, 'sad');
----- then
ALTER TABLE changing DROP COLUMN a;
ALTER TABLE changing ALTER COLUMN b DROP NOT NULL;
INSERT INTO changing VALUES (3, NULL, 3);
----- then
ALTER TABLE changing RENAME COLUMN c TO renamed;
ALTER TABLE changing ALTER COLUMN renamed TYPE text;
ALTER TYPE mood ADD VALUE 'angry';
INSERT INTO changing VALUES (4, 'b', 'text', 'angry');
----- then
DELETE FROM changing WHERE id IN (3, 4);
----- then
ALTER TABLE changing DROP CONSTRAINT changing_pkey, ADD PRIMARY KEY (b);
INSERT INTO changing VALUES (5, 'key', 't', 'ok');
UPDATE changing SET id = 6 WHERE id = 5;
DELETE FROM changing WHERE id = 6;
